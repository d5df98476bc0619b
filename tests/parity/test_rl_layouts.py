"""No layout, and no cut into micro-batches, changes a policy loss or its gradient."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from m1.config.schema import ModelConfig, MoeConfig

MODEL = ModelConfig(
    num_layers=3,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rotary_dim=4,
    layer_pattern=("lightning", "softmax", "lightning"),
    moe=MoeConfig(num_experts=4, top_k=2, ffn_hidden_size=32, aux_loss_coefficient=0.0),
    max_position=64,
    init_std=0.2,
)
LAYOUTS = {
    "one": {},
    "dp2": {"data": 2},
    "tp2": {"tensor": 2},
    "cp2": {"context": 2},
    "ep2": {"data": 2, "expert": 2},
}
LOSSES = {
    "cispo": {"clip_eps_high": 0.2, "behaviour_cap": 2.0},
    "dapo-prompt": {"name": "dapo", "aggregation": "prompt_mean", "kl_coefficient": 0.1},
    "gspo": {"name": "gspo", "mask_eps_low": 0.05, "mask_eps_high": 0.05},
    "mix": {"aggregation": "sample_token_mix", "clip_eps_high": 0.2},
}
REPLAYED = ("mix",)
"""Of these the samples name their experts, at random."""
SIZES = (1000, 24)
"""Tokens of a micro-batch: all of them, and as few as the longest completion needs."""
# Measured: at most 2.4e-7.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    root = tmp_path_factory.mktemp("rl-layouts")
    model = MODEL.model_dump(mode="json")
    job = {
        "root": str(root), "model": model, "layouts": LAYOUTS, "losses": LOSSES, "sizes": SIZES,
        "replayed": REPLAYED,
    }  # fmt: skip
    (root / "job.json").write_text(json.dumps(job))
    worker = Path(__file__).with_name("rl_layout_worker.py")
    command = [sys.executable, str(worker), str(root / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return {name: json.loads((root / f"{name}.json").read_text()) for name in LAYOUTS}


def test_replayed_experts_change_what_is_scored(results):
    plain, replayed = (results["one"][name]["1000"] for name in ("cispo", "mix"))
    assert "rl/routing_difference_fraction" not in plain
    # Two of four experts at random are the router's own pair once in six.
    assert 0.75 < replayed["rl/routing_difference_fraction"] < 0.92
    assert abs(replayed["scored"] - plain["scored"]) > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_gradient_and_metrics_are_those_of_one_process_and_one_micro_batch(
    results, layout, loss
):
    expected = results["one"][loss]["1000"]
    assert expected["rl/clip_fraction"] > 0 and expected["rl/grad_norm"] > 0.01
    for size in SIZES:
        found = results[layout][loss][str(size)]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            # Losses are sums of both signs, of terms of the size of the gradient's.
            scale = max(abs(value), 1.0) if key in ("rl/loss", "rl/surrogate") else abs(value)
            assert abs(found[key] - value) <= TOLERANCE * scale, (key, size)
