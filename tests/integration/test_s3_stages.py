"""Stages whose results live on S3: uploaded when finished, downloaded and verified where needed."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from faulty_proxy import faulty_proxy

from m1.config.loading import load_recipe
from m1.launch import finished_stages
from m1.stage import StageOutput, execute, fetch, finished
from m1.storage import open_storage
from m1.storage.parts import PART_BYTES
from m1.types import Pointer

ROOT = Path(__file__).parents[2]
MINI = ROOT / "tests/recipes/mini.toml"


def test_a_stage_reads_from_s3_what_another_machine_wrote(
    s3_bucket, s3_server, tmp_path, monkeypatch
):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    root = f"s3://{s3_bucket}/runs"

    def stage(name: str, scratch: Path) -> None:
        program = "from m1.cli import main; main()"
        sets = [f"--set=storage.root={root}", f"--set=storage.scratch={scratch}"]
        subprocess.run(
            [sys.executable, "-c", program, "stage", name, str(MINI), *sets],
            cwd=ROOT,
            env=os.environ,
            check=True,
            capture_output=True,
            timeout=600,
        )

    stage("data", tmp_path / "first")
    shutil.rmtree(tmp_path / "first")  # the machine that made the data is gone
    stage("pretrain", tmp_path / "second")
    pointers = finished_stages(load_recipe([MINI], overrides=[f"storage.root={root}"]))
    assert list(pointers) == ["data", "pretrain"]
    assert pointers["pretrain"].uri.startswith(root)
    kept = open_storage(root).list("stages")
    assert any(key.endswith("output/checkpoint/.metadata") for key in kept)
    assert any(key.endswith("metrics.jsonl") for key in kept)


def _recipe(s3_bucket: str, tmp_path: Path, scratch: str):
    sets = [f"storage.root=s3://{s3_bucket}/runs", f"storage.scratch={tmp_path / scratch}"]
    return load_recipe([MINI], overrides=[*sets, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"])


def _race(s3_bucket, tmp_path, body):
    """Two machines run one stage; what each returns."""
    found: dict[str, Pointer] = {}

    def machine(name: str) -> None:
        found[name] = execute("data", _recipe(s3_bucket, tmp_path, name), body)

    threads = [threading.Thread(target=machine, args=[name]) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _attempts(s3_bucket) -> set[str]:
    return {key.split("/")[2] for key in open_storage(f"s3://{s3_bucket}/runs").list("stages")}


def test_a_machine_waits_for_another_that_runs_the_stage_and_takes_its_result(s3_bucket, tmp_path):
    entered = []

    def body(context, recipe):
        entered.append(context.folder)
        context.output.mkdir()
        (context.output / "file").write_text("the same")
        time.sleep(2)
        return StageOutput()

    found = _race(s3_bucket, tmp_path, body)
    assert len(entered) == 1 and found["one"] == found["two"]
    assert len(_attempts(s3_bucket)) == 2  # the pointer and one attempt


def test_of_two_machines_that_run_a_stage_at_once_one_result_holds(s3_bucket, tmp_path):
    storage = open_storage(f"s3://{s3_bucket}/runs")
    both = threading.Barrier(2, timeout=60)

    def body(context, recipe):
        # As after a long silence of the first: its lease is gone, and the second enters.
        storage.connection.client.remove_object(
            s3_bucket, f"runs/stages/{context.folder.name}/.lock"
        )
        context.output.mkdir()
        (context.output / "file").write_text(context.folder.parents[1].name)
        both.wait()
        return StageOutput()

    found = _race(s3_bucket, tmp_path, body)
    assert found["one"] == found["two"]
    folder = fetch(found["one"], scratch=tmp_path / "third")
    assert (folder / "file").read_text() in ("one", "two")
    assert len(_attempts(s3_bucket)) == 2  # the loser's files are gone


def test_a_component_killed_while_it_uploads_leaves_no_pointer_and_goes_on(
    s3_bucket, s3_server, tmp_path, monkeypatch
):
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_s3_stages import _recipe, _large
from m1.stage import execute
execute("data", _recipe({s3_bucket!r}, Path({str(tmp_path)!r}), "one"), _large)
"""
    recipe = _recipe(s3_bucket, tmp_path, "one")
    with faulty_proxy(s3_server.endpoint) as (address, faults):
        faults.pause_seconds = 0.2
        process = subprocess.Popen(
            [sys.executable, "-c", program], env={**os.environ, "S3_ENDPOINT": address}, cwd=ROOT
        )
        deadline = time.monotonic() + 120
        while not any("partNumber=2" in path for _, path, _ in faults.seen):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert finished("data", recipe) is None
    pointer = execute("data", recipe, _large)  # at once: the dead one's lease is its own
    folder = fetch(pointer, scratch=tmp_path / "other")
    assert (folder / "shard").stat().st_size == 3 * PART_BYTES
    assert finished("data", recipe) == pointer


def _large(context, recipe):
    context.output.mkdir(exist_ok=True)
    (context.output / "shard").write_bytes(bytes(range(256)) * (3 * PART_BYTES // 256))
    return StageOutput()
