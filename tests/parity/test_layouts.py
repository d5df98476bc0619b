"""No parallel layout changes what is learned, and a checkpoint of any loads under any other."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

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
    "pp2": {"pipeline": 2, "pipeline_layers": [1, 2]},
    "ep2": {"data": 2, "expert": 2},
    "cp2": {"context": 2},
    "tp2-ep2": {"tensor": 2, "expert": 2},
    "cp2-recompute": {"context": 2, "recompute": "full"},
    "dp2-recompute": {"data": 2, "recompute": "selective"},
}

PLACED = [name for name in LAYOUTS if "recompute" not in name]
"""Layouts that place the parameters differently."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Results and checkpoints of every layout, by name."""
    root = tmp_path_factory.mktemp("layouts")
    job = {
        "model": MODEL.model_dump(mode="json"),
        "root": str(root),
        "layouts": LAYOUTS,
        "reload": PLACED,
    }
    (root / "job.json").write_text(json.dumps(job))
    worker = Path(__file__).with_name("layout_worker.py")
    command = [sys.executable, str(worker), str(root / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return root


def results(root: Path, name: str, key: str) -> list[float]:
    return [step[key] for step in json.loads((root / f"{name}.json").read_text())]


@pytest.mark.parametrize("name", sorted(set(LAYOUTS) - {"one"}))
def test_a_layout_gives_the_loss_and_gradient_norm_of_one_process(runs, name):
    # Measured: at most 1e-6 relative.
    for key in ("loss", "norm", "scored"):
        assert results(runs, name, key) == pytest.approx(results(runs, "one", key), rel=1e-5)
    assert results(runs, name, "scored") == pytest.approx(results(runs, name, "loss"), rel=1e-5)


@pytest.mark.parametrize("name", PLACED)
def test_a_checkpoint_of_any_layout_loads_under_this_one_unchanged(runs, name):
    for other in set(PLACED) - {name}:
        saved, again = tensors(runs / other), tensors(runs / f"{other}-as-{name}")
        assert saved.keys() == again.keys() and any("exp_avg_sq" in key for key in saved)
        assert [key for key in saved if not torch.equal(saved[key], again[key])] == [], other


@cache
def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    from megatron.core import dist_checkpointing

    from m1.model.parallel import initialize

    initialize()
    loaded = dist_checkpointing.load_plain_tensors(str(folder))
    return {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
