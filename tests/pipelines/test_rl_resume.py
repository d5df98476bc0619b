"""kill -9 of the rl stage in each of its phases."""

from pathlib import Path

import pytest
import torch
from killing import kill_stages  # beside this file
from serving_policy import serve_policy

from m1.config.loading import load_recipe
from m1.launch import finished_stages
from m1.rollout.journal import Journal
from m1.stage import read_metrics, stage_folder

RECIPE = Path(__file__).parents[1] / "recipes/mini.toml"
# Of three steps with a checkpoint after each: before the first, between two, and after the last.
SYNC_KILLS = [
    ("sample", 0),
    ("save", 0),
    ("score", 1),
    ("old_logprobs", 1),
    ("update", 2),
    ("publish", 2),
    ("export", 2),
]
SAMPLED_AGAIN = "rl.loss.clip_eps_high=3.99"
"""A stage of its own, which the recipe's does not share; no ratio comes near it."""
REPLAY = "rl.routing_replay=rollout"


def recipe_of(root: Path, *sets: str):
    return load_recipe([RECIPE], overrides=[f"storage.root={root}", *sets])


Kills = list[tuple[str, int]]


def run_with_kills(root: Path, *stages: tuple[list[str], Kills]) -> list[Path]:
    """The folder of each stage after its kills and a last, undisturbed attempt."""
    described = [
        {"stage": "rl", "sets": sets, "kills": [{"phase": p, "step": n} for p, n in kills]}
        for sets, kills in stages
    ]
    kill_stages(root, described)
    return [stage_folder("rl", recipe_of(root, *sets)) for sets, _ in stages]


@pytest.fixture(scope="module")
def stages(first_run) -> list[Path]:
    """The stage killed in each of its phases, and one that replays routing undisturbed."""
    root, _ = first_run
    return run_with_kills(root, ([SAMPLED_AGAIN], SYNC_KILLS), ([REPLAY], []))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from megatron.core import dist_checkpointing

    from m1.model.parallel import initialize

    initialize()
    return dist_checkpointing.load_plain_tensors(str(folder / "output" / "checkpoint"))


def test_killed_in_each_phase_the_stage_ends_with_the_same_bits(first_run, stages):
    root, _ = first_run
    expected = tensors(stage_folder("rl", recipe_of(root)))
    folder = stages[0]
    found = tensors(folder)
    assert expected.keys() == found.keys() and expected
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3]


def test_a_stage_that_replays_routing_computes_each_token_as_it_was_sampled(stages):
    metrics = [line["metrics"] for line in read_metrics(stages[1] / "metrics.jsonl")]
    assert len(metrics) == 3
    # Both compute in FP32, so few choices would differ.
    assert all(m["rl/routing_difference_fraction"] < 1e-3 for m in metrics)
    assert all(m["rl/mismatch_ratio_max"] < 1 + 1e-3 for m in metrics)


@pytest.mark.exhaustive
def test_with_replayed_routing_a_killed_stage_ends_with_the_same_bits(first_run, stages):
    root, _ = first_run
    (killed,) = run_with_kills(root, ([REPLAY, SAMPLED_AGAIN], SYNC_KILLS))
    expected, found = tensors(stages[1]), tensors(killed)
    assert expected.keys() == found.keys() and expected
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.slow
def test_a_killed_asynchronous_stage_trains_on_every_group_once(first_run):
    root, _ = first_run
    finished = finished_stages(recipe_of(root))
    with serve_policy(root / "served", recipe_of(root), finished) as url:
        sets = ["rl.rollout.mode=async", f'rl.rollout.urls=["{url}"]', "rl.num_steps=5"]
        kills = [("sample", 0), ("update", 1), ("save", 2), ("old_logprobs", 3)]
        (folder,) = run_with_kills(root, (sets, kills))
    metrics = [line["metrics"] for line in read_metrics(folder / "metrics.jsonl")]
    assert len(metrics) == 5
    # At most two batches of two updates ahead, whatever died in between.
    assert max(m["rl/policy_lag_of_batch"] for m in metrics) <= 4
    steps = Journal(folder / "rollouts").steps()
    kept = [ticket for line in steps for ticket in line["kept"]]
    stale = [ticket for line in steps for ticket in line["stale"]]
    assert [line["step"] for line in steps] == [0, 1, 2, 3, 4]
    assert len(kept) == 5 * 4 and len(set(kept)) == len(kept)
    # Whatever was taken before the last group trained on was trained on, was too old, or waits.
    waiting = set(Journal(folder / "rollouts").tickets())
    assert set(range(max(kept))) <= {*kept, *stale, *waiting}
    assert finished_stages(recipe_of(root, *sets))["rl"].step == 10
