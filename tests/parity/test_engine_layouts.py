"""The engine samples the same over tensor and expert ranks as on one."""

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
    moe=MoeConfig(num_experts=6, top_k=2, ffn_hidden_size=32),
    max_position=64,
    init_std=0.2,
)
LAYOUTS = {
    "one": {},
    "tp2": {"tensor": 2},
    "ep2": {"data": 2, "expert": 2},
    "tp2-ep2": {"tensor": 2, "expert": 2},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("engines")
    job = {"model": MODEL.model_dump(mode="json"), "root": str(root), "layouts": LAYOUTS}
    (root / "job.json").write_text(json.dumps(job))
    worker = Path(__file__).with_name("engine_worker.py")
    command = [sys.executable, str(worker), str(root / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return {name: json.loads((root / f"{name}.json").read_text()) for name in LAYOUTS}


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_completions_are_those_of_one_rank(results, layout):
    for one, many in zip(results["one"]["engine"], results[layout]["engine"], strict=True):
        assert many["tokens"] == one["tokens"]
        assert many["logprobs"] == pytest.approx(one["logprobs"], abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_follow_the_first_through_requests_and_new_weights(results, layout):
    found = results[layout]["loop"]
    assert found["tokens"] == results["one"]["loop"]["tokens"]
    assert len(found["tokens"]) == 15
    assert "neither" in found["refusal"]
