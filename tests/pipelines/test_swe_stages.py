"""Software engineering tasks from the sandbox stage into RL and evaluation."""

import json
from pathlib import Path

import pytest

from m1.config.loading import load_recipe
from m1.rollout.traces import read_step
from m1.sandbox import bubblewrap
from m1.stage import finished, stage_folder

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        bubblewrap.failure() is not None, reason=f"no sandbox here: {bubblewrap.failure()}"
    ),
]
MINI = Path(__file__).parents[1] / "recipes/mini.toml"
EPISODES = "{max_turns=2, max_reply_tokens=8, max_tokens=1400, max_observation_characters=40}"
COMMON = ["model.max_position=2048", "pretrain.num_steps=2", "sft.num_steps=2"]
LEARNED = [*COMMON, "sandbox={num_runs=1}", f"rl.episodes={EPISODES}", "rl.num_steps=2",
           "rl.micro_batch_tokens=2048",
           'rl.curriculum={sources=[{source="sums"}, {source="swe"}]}']  # fmt: skip
KEPT = [*COMMON, "sandbox={num_runs=1, num_heldout=1}", "rl.num_steps=1",
        f"evaluate.episodes={EPISODES}",
        'evaluate.benchmarks=[{name="swe", task="swe"}]']  # fmt: skip


def run(m1, root, overrides, stages):
    overrides = [f"storage.root={root}", *overrides]
    sets = [f"--set={override}" for override in overrides]
    for stage in stages:
        done = m1("stage", stage, str(MINI), *sets)
        assert done.returncode == 0, done.stdout + done.stderr
    return load_recipe([MINI], overrides=overrides)


def test_rl_draws_instances_and_evaluation_those_that_are_held_out(m1, tmp_path):
    stages = ("data", "sandbox", "pretrain", "sft", "rl")
    recipe = run(m1, tmp_path, LEARNED, stages)
    folder = stage_folder("rl", recipe)
    metrics = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").open()]
    assert sum(m.get("rl/episodes", 0) for m in metrics) >= recipe.rl.group_size
    assert all(m.get("rl/failed_rollouts", 0) == 0 for m in metrics)
    rollouts = [r for step in (1, 2) for r in read_step(folder / "rollouts", step)]
    played = [r for r in rollouts if r.task_id == "m1-ranges__0.1.0-0.1.1"]
    assert len(played) >= recipe.rl.group_size
    recipe = run(m1, tmp_path, KEPT, ("sandbox", "rl", "evaluate"))
    scores = finished("evaluate", recipe).metadata["scores"]["swe"]
    assert set(scores) == {"pretrain", "sft", "rl"}
    assert all(s["mean"] == 0.0 and (s["n"], s["k"]) == (1, 2) for s in scores.values())
