import json
from dataclasses import asdict

import pyarrow.parquet as pq
import pytest

from m1.rollout.find import rollout_folders
from m1.rollout.traces import (
    COLUMNS,
    read_step,
    rewind,
    steps_in,
    tally_accuracy,
    write_step,
)
from m1.types import Completion, M1Error, Reward, Rollout, RolloutGroup, Task


def group(name, *accuracies, tokens=(7, 8, 9), failed=()):
    task = Task(name, "sums", f"What is {name}?", "4", "v")
    rollouts = []
    for index, accuracy in enumerate(accuracies):
        own = (*tokens, index)
        n = len(own)
        completion = Completion(
            (1, 2), own, (-0.25,) * n, (0.5,) * n, "stop", (3,) * (n - 1) + (4,)
        )
        parts = {"correctness": accuracy, "format": 0.1}
        reward = Reward(accuracy + 0.1, accuracy, parts, index in failed)
        rollouts.append(Rollout(task, completion, reward))
    return RolloutGroup(task, tuple(rollouts))


def decode(completion):
    return "é" + "".join(map(str, completion.tokens))


def write(folder, step, *groups, kept=()):
    return write_step(folder, step, groups, decode=decode, kept=kept)


def test_what_is_read_is_what_was_written(tmp_path):
    first, second = group("a", 1.0, 0.0), group("b", 0.5)
    write(tmp_path, 3, first, second, kept=[second])
    rows = read_step(tmp_path, 3)
    assert [(r.group, r.index, r.task_id, r.is_kept) for r in rows] == [
        (0, 0, "a", False),
        (0, 1, "a", False),
        (1, 0, "b", True),
    ]
    assert asdict(rows[1]) == {
        "step": 3,
        "group": 0,
        "index": 1,
        "task_id": "a",
        "source": "sums",
        "prompt": "What is a?",
        "text": "é7891",
        "reference": "4",
        "prompt_tokens": (1, 2),
        "tokens": (7, 8, 9, 1),
        "logprobs": (-0.25,) * 4,
        "policy_versions": (3, 3, 3, 4),
        "finish_reason": "stop",
        "reward": 0.1,
        "accuracy": 0.0,
        "parts": {"correctness": 0.0, "format": 0.1},
        "is_failed": False,
        "is_kept": False,
    }


def test_columns_are_those_documented(tmp_path):
    path = write(tmp_path, 1, group("a", 1.0))
    assert pq.read_schema(path).names == list(COLUMNS)


def test_a_completion_without_tokens_and_many_rows_are_kept(tmp_path):
    empty = Completion((1,), (), (), (), "stop", ())
    task = Task("e", "sums", "", "", "v")
    groups = [RolloutGroup(task, (Rollout(task, empty, Reward(0.0, 0.0, {})),) * 8)] * 70
    write(tmp_path, 1, *groups)
    rows = read_step(tmp_path, 1)
    assert len(rows) == 560  # more than are held in memory at once
    assert {(r.tokens, tuple(r.parts)) for r in rows} == {((), ())}
    assert [r.group for r in rows[::8]] == list(range(70))


def test_the_same_step_again_gives_the_same_bytes_and_leaves_nothing_else(tmp_path):
    before = write(tmp_path, 1, group("a", 1.0)).read_bytes()
    assert write(tmp_path, 1, group("a", 1.0)).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001.parquet"]


def test_a_torn_file_is_not_a_step(tmp_path):
    write(tmp_path, 1, group("a", 1.0))
    (tmp_path / "step-000002.partial").write_bytes(b"PAR1")
    assert steps_in(tmp_path) == [1]
    assert steps_in(tmp_path / "absent") == []


def test_rewinding_drops_what_is_about_to_be_repeated(tmp_path):
    for step in (1, 2, 3, 10):
        write(tmp_path, step, group("a", 1.0))
    rewind(tmp_path, 2)
    assert steps_in(tmp_path) == [1, 2]


def test_accuracy_is_tallied_over_steps_without_failed_rollouts(tmp_path):
    write(tmp_path, 1, group("a", 1.0, 0.0, 1.0, failed={2}), group("b", 0.0))
    write(tmp_path, 2, group("a", 0.5))
    assert tally_accuracy(tmp_path) == {"a": (1.5, 3), "b": (0.0, 1)}


def test_a_task_and_an_index_are_found(tmp_path):
    write(tmp_path, 1, group("a", 1.0, 0.0), group("b", 1.0, 0.0))
    (found,) = read_step(tmp_path, 1, task="b", index=1)
    assert (found.task_id, found.index, found.accuracy) == ("b", 1, 0.0)


def test_what_is_not_there_is_named_beside_what_is(tmp_path):
    write(tmp_path, 4, group("a", 1.0, 0.0))
    with pytest.raises(M1Error, match=r"step 5 has no rollouts.*those of 1 steps: 4"):
        read_step(tmp_path, 5)
    with pytest.raises(M1Error, match=r"no rollout of task 'z'.*go to 1, its tasks are a"):
        read_step(tmp_path, 4, task="z", index=0)


def run_with(tmp_path, stages):
    hashes = {name: {"hash": f"{i}" * 64} for i, name in enumerate(stages)}
    run = tmp_path / "run-1"
    run.mkdir()
    (run / "summary.json").write_text(json.dumps({"stages": hashes}))
    for name in stages:
        folder = tmp_path / "stages" / f"{name}-{hashes[name]['hash'][:12]}" / "rollouts"
        if name.startswith("rl"):
            write(folder, 1, group(name, 1.0))
    return run


def test_a_run_leads_to_the_rollouts_of_its_rl_stages_in_order(tmp_path):
    run = run_with(tmp_path, ["data", "rl_8192", "rl_512"])
    (tmp_path / "latest").symlink_to(run.name)
    folders = rollout_folders(tmp_path / "latest")
    assert list(folders) == ["rl_512", "rl_8192"]
    assert read_step(folders["rl_512"], 1)[0].task_id == "rl_512"
    assert rollout_folders(folders["rl_512"].parent) == {
        "rl_512": folders["rl_512"].parent / "rollouts"
    }


def test_a_run_without_rollouts_says_so(tmp_path):
    run = run_with(tmp_path, ["data"])
    with pytest.raises(M1Error, match="no RL stage"):
        rollout_folders(run)
    with pytest.raises(M1Error, match="is no folder"):
        rollout_folders(tmp_path / "absent")
