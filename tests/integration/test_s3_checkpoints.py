"""Checkpoints of a stage under way on S3: sent as they are made, found with another disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from faulty_proxy import faulty_proxy
from megatron.core import dist_checkpointing

from m1.config.loading import load_recipe
from m1.launch import finished_stages, run_stage
from m1.model import checkpoint
from m1.stage import fetch
from m1.stage_backup import CheckpointBackup
from m1.storage import open_storage

ROOT = Path(__file__).parents[2]
MINI = ROOT / "tests/recipes/mini.toml"
MARKER = "complete.json"
NUM_STEPS = {"pretrain": 10, "rl": 6}
BEFORE = {"pretrain": ["data"], "rl": ["data", "pretrain", "sft"]}


def recipe_on(root, scratch):
    sets = [f"storage.root={root}", f"storage.scratch={scratch}"]
    sets += [f"pretrain.num_steps={NUM_STEPS['pretrain']}", f"rl.num_steps={NUM_STEPS['rl']}"]
    records = f"tracking.uri=sqlite:///{Path(scratch).parent}/mlflow.db"
    return load_recipe([MINI], overrides=[*sets, records])


def kill_with_a_checkpoint_on_s3(stage, root, scratch, storage):
    """SIGKILL in the middle of a stage, once a checkpoint is complete on S3."""
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_s3_checkpoints import recipe_on
from m1.launch import run_stage
run_stage({stage!r}, recipe_on({root!r}, {str(scratch)!r}))
"""
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # as this process has
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=one)
    deadline = time.monotonic() + 300
    while not any("/checkpoints/" in k and k.endswith(MARKER) for k in storage.list("stages")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("stage", ["pretrain", pytest.param("rl", marks=pytest.mark.exhaustive)])
def test_a_killed_stage_goes_on_from_s3_on_an_empty_disk_to_the_same_weights(
    stage, s3_bucket, tmp_path
):
    root = f"s3://{s3_bucket}/runs"
    storage = open_storage(root)
    for earlier in BEFORE[stage]:
        run_stage(earlier, recipe_on(root, tmp_path / "one"))
    kill_with_a_checkpoint_on_s3(stage, root, tmp_path / "one", storage)
    shutil.rmtree(tmp_path / "one")  # the pod's disk
    recipe = recipe_on(root, tmp_path / "two")
    assert stage not in finished_stages(recipe)
    killed = time.time()
    marker = max(k for k in storage.list("stages") if "/checkpoints/" in k and k.endswith(MARKER))
    place, by, name = marker.rsplit("/", 3)[:3]
    # What a pod left that died while it sent: a newer checkpoint in part.
    for key in storage.list(f"{place}/{by}/{name}"):
        if not key.endswith((MARKER, ".distcp")):
            storage.write_bytes(key.replace(name, "step_00000012"), storage.read_bytes(key))

    resumed = run_stage(stage, recipe)
    lines = storage.read_bytes(f"{resumed.uri.removeprefix(root)[1:-7]}/metrics.jsonl")
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS[stage] + 1))
    repeated = [row["step"] for row in rows if row["time"] > killed]
    assert repeated[0] == int(name.removeprefix("step_")) + 1
    assert not storage.list(place)  # finished: none is needed any more
    found = weights(resumed, tmp_path)

    storage.remove_folder(place.rpartition("/")[0])
    whole = run_stage(stage, recipe_on(root, tmp_path / "three"))
    expected = weights(whole, tmp_path)
    assert len(expected) > 40 and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def weights(pointer, folder):
    """Final weights of a stage, by their names in the checkpoint."""
    inside = fetch(pointer, scratch=folder) / "checkpoint"
    plain = dist_checkpointing.load_plain_tensors(str(inside))
    return {name: value for name, value in plain.items() if isinstance(value, torch.Tensor)}


@pytest.fixture
def place(s3_bucket, tmp_path):
    """A storage and a stage's folder."""
    folder = tmp_path / "scratch" / "stages" / "pretrain-0123456789ab"
    folder.mkdir(parents=True)
    return open_storage(f"s3://{s3_bucket}/runs"), folder


def made(folder, step, *, size=100):
    """A complete checkpoint on this machine."""
    path = folder / "checkpoints" / f"step_{step:08d}"
    (path / "deep").mkdir(parents=True)
    (path / "deep" / "shard").write_bytes(bytes([step]) * size)
    (path / ".metadata").write_text("where")
    (path / MARKER).write_text(str(step))
    return path


def send(backup, path, *, keep=1):
    metrics = path.parents[1] / "metrics.jsonl"
    metrics.write_text(path.name)
    rollouts = path.parents[1] / "rollouts"
    rollouts.mkdir(exist_ok=True)
    (rollouts / f"{path.name}.parquet").write_text(path.name)
    return backup.send(path, marker=MARKER, keep=keep, records=[metrics, rollouts])


def steps(storage):
    return [k.split("/")[4] for k in storage.list("stages") if k.endswith(MARKER)]


def test_older_checkpoints_go_when_a_newer_one_is_complete_there(place):
    storage, folder = place
    for step, kept in ((2, [2]), (4, [2, 4]), (6, [4, 6])):
        backup = CheckpointBackup(storage, folder)
        send(backup, made(folder, step), keep=2)
        assert backup.close() == []
        assert steps(storage) == [f"step_{n:08d}" for n in kept]


def test_another_disk_gets_the_newest_checkpoint_with_its_records(place, tmp_path):
    storage, folder = place
    backup = CheckpointBackup(storage, folder)
    send(backup, made(folder, 2))
    assert backup.close() == []
    other = tmp_path / "other" / "stages" / folder.name
    other.mkdir(parents=True)
    (other / "checkpoints" / "step_00000002").mkdir(parents=True)  # torn
    (other / "metrics.jsonl").write_text("of earlier steps")
    CheckpointBackup(storage, other).restore(other / "checkpoints", marker=MARKER)
    found = {p.relative_to(other).as_posix() for p in other.rglob("*") if p.is_file()}
    shard = other / "checkpoints" / "step_00000002" / "deep" / "shard"
    assert shard.read_bytes() == bytes([2]) * 100
    assert found >= {"metrics.jsonl", "rollouts/step_00000002.parquet"}
    assert (other / "metrics.jsonl").read_text() == "step_00000002"
    newer = made(other, 4)
    CheckpointBackup(storage, other).restore(other / "checkpoints", marker=MARKER)
    assert newer.exists() and len(list((other / "checkpoints").glob("step_*"))) == 2
    # The next one from here replaces what the first disk had sent.
    again = CheckpointBackup(storage, other)
    send(again, newer)
    assert again.close() == []
    assert steps(storage) == ["step_00000004"]
    assert len({k.split("/")[3] for k in storage.list("stages")}) == 1


def test_sending_holds_nothing_up_and_leaves_out_what_was_overtaken(place, s3_server, monkeypatch):
    storage, folder = place
    with faulty_proxy(s3_server.endpoint) as (address, faults):
        monkeypatch.setenv("S3_ENDPOINT", address)
        slow = open_storage(storage.uri(""))
        faults.pause_seconds = 0.5
        backup = CheckpointBackup(slow, folder)
        begun = time.monotonic()
        first, second, third = (made(folder, step) for step in (2, 4, 6))
        send(backup, first)
        while not faults.seen:
            time.sleep(0.01)
        needed, _ = send(backup, second)
        assert needed == {first, second}
        needed, _ = send(backup, third)
        assert needed == {first, third}
        assert time.monotonic() - begun < 2
        faults.pause_seconds = 0.0
        assert backup.close() == []
        assert steps(slow) == ["step_00000006"]


def test_what_is_being_sent_is_not_dropped_here(place):
    _, folder = place
    paths = [made(folder, step) for step in (2, 4, 6)]
    checkpoint.prune(folder / "checkpoints", keep=1, needed={paths[0]})
    assert [path.exists() for path in paths] == [True, False, True]
    checkpoint.prune(folder / "checkpoints", keep=1)
    assert [path.exists() for path in paths] == [False, False, True]


def test_a_checkpoint_that_cannot_be_sent_is_told_and_the_next_one_is_tried(place, monkeypatch):
    storage, folder = place
    monkeypatch.setenv("S3_RETRY_SECONDS", "0.2")
    monkeypatch.setenv("S3_ENDPOINT", "http://127.0.0.1:9")
    backup = CheckpointBackup(open_storage(storage.uri("")), folder)
    send(backup, made(folder, 2))
    deadline = time.monotonic() + 60
    errors = []
    while not errors and time.monotonic() < deadline:
        time.sleep(0.2)
        _, errors = send(backup, folder / "checkpoints" / "step_00000002")
    assert "step_00000002 was not sent" in errors[0] and "127.0.0.1:9" in errors[0]
    backup.close()


def test_ranks_that_restore_at_once_get_one_whole_copy(place, tmp_path):
    storage, folder = place
    backup = CheckpointBackup(storage, folder)
    send(backup, made(folder, 2, size=1 << 20))
    assert backup.close() == []
    other = tmp_path / "other" / "stages" / folder.name
    seen = []

    def rank():
        CheckpointBackup(storage, other).restore(other / "checkpoints", marker=MARKER)
        seen.append((other / "checkpoints" / "step_00000002" / MARKER).exists())

    threads = [threading.Thread(target=rank) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 4
