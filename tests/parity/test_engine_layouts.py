"""The engine samples the same over tensor, expert and data ranks as on one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from m1.config.schema import ModelConfig, MoeConfig
from m1.data.tokenizer import train_tokenizer

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
    "dp2": {"data": 2},
    "ep2": {"data": 2, "expert": 2},
    "tp2-ep2": {"tensor": 2, "expert": 2},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("engines")
    job = {"model": MODEL.model_dump(mode="json"), "root": str(root), "layouts": LAYOUTS}
    texts = ["what is one and one", "one and two is three"]
    train_tokenizer(texts, vocab_size=300, folder=root / "tokenizer")
    (root / "job.json").write_text(json.dumps(job))
    worker = Path(__file__).with_name("engine_worker.py")
    command = [sys.executable, str(worker), str(root / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return {path.stem: json.loads(path.read_text()) for path in root.glob("*-?.json")}


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_completions_are_those_of_one_rank(results, layout):
    for one, many in zip(results["one-0"]["engine"], results[f"{layout}-0"]["engine"], strict=True):
        assert many["tokens"] == one["tokens"]
        assert many["logprobs"] == pytest.approx(one["logprobs"], abs=1e-5)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "dp2"])
def test_ranks_follow_the_first_through_requests_and_new_weights(results, layout):
    found = results[f"{layout}-0"]["loop"]
    assert found["tokens"] == results["one-0"]["loop"]["tokens"]
    assert len(found["tokens"]) == 15
    assert "neither" in found["refusal"]


def test_two_data_ranks_get_the_rollouts_of_one_process_and_sample_half_of_them_each(results):
    one, first, second = (results[name]["rollouts"] for name in ("one-0", "dp2-0", "dp2-1"))
    assert len(one["groups"]) == 5
    assert first["groups"] == one["groups"] == second["groups"]
    assert 0 < second["sampled"] < first["sampled"]
    assert first["sampled"] + second["sampled"] == one["sampled"]


@pytest.mark.parametrize("layout", ["tp2", "ep2", "tp2-ep2"])
def test_ranks_that_compute_together_sample_the_same_groups(results, layout):
    one, first, second = (
        results[name]["rollouts"] for name in ("one-0", f"{layout}-0", f"{layout}-1")
    )
    assert first == second
    assert first["sampled"] == one["sampled"]
    for ours, theirs in zip(one["groups"], first["groups"], strict=True):
        tokens = [[r["completion"]["tokens"] for r in g["rollouts"]] for g in (ours, theirs)]
        assert tokens[0] == tokens[1]


def test_two_data_ranks_update_by_the_gradient_of_one_process(results):
    one, first, second = (results[name]["updates"] for name in ("one-0", "dp2-0", "dp2-1"))
    assert first == second
    for ours, theirs in zip(first, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
