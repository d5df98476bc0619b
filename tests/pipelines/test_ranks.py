"""A stage of several processes: losses as of one process, resumption after a kill, and errors."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from m1.config.loading import load_recipe
from m1.launch import finished_stages
from m1.stage import read_metrics, stage_folder

RECIPE = "tests/recipes/mini.toml"
LAYOUT = "pretrain.parallel.data=2"


def losses(folder: Path) -> list[float]:
    return [line["metrics"]["pretrain/loss"] for line in read_metrics(folder / "metrics.jsonl")]


def test_a_stage_of_two_processes_survives_a_kill_and_learns_as_one_does(m1, first_run):
    root, _ = first_run
    sets = [f"storage.root={root}", LAYOUT]
    recipe = load_recipe([Path(RECIPE)], overrides=sets)
    folder = stage_folder("pretrain", recipe)
    program = "from m1.cli import main; main()"
    command = [sys.executable, "-c", program, "stage", "pretrain", RECIPE]
    command += [f"--set={change}" for change in sets]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while len(losses(folder)) < 3:
        assert process.poll() is None and time.time() < deadline, (folder / "ranks.log").read_text()
        time.sleep(0.05)
    ranks = psutil.Process(process.pid).children(recursive=True)
    assert len(ranks) >= 3  # torchrun and two ranks
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    assert "pretrain" not in finished_stages(recipe)

    done = m1("stage", "pretrain", RECIPE, *(f"--set={change}" for change in sets))
    assert done.returncode == 0, done.stderr + (folder / "ranks.log").read_text()
    alone = stage_folder("pretrain", load_recipe([Path(RECIPE)], overrides=sets[:1]))
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-5)
    pointer = finished_stages(recipe)["pretrain"]
    assert pointer.step == 6 and pointer.metadata["model_id"]


def test_what_a_rank_cannot_do_is_said_once_and_plainly(m1, first_run):
    root, _ = first_run
    sets = [f"storage.root={root}", LAYOUT, "pretrain.start=/none"]
    failed = m1("stage", "pretrain", RECIPE, *(f"--set={change}" for change in sets))
    assert failed.returncode == 1
    assert "/none neither is nor holds a checkpoint" in failed.stderr
    assert "Traceback" not in failed.stderr
