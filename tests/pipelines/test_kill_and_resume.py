"""kill -9 inside a stage, then the same command: the same weights as without the kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from m1.config.loading import load_recipe
from m1.launch import finished_stages
from m1.types import Pointer

ROOT = Path(__file__).parents[2]
RECIPE = "tests/recipes/mini.toml"


def command(stage: str, root: Path) -> list[str]:
    program = "from m1.cli import main; main()"
    return [sys.executable, "-c", program, "stage", stage, RECIPE, f"--set=storage.root={root}"]


def finish(stage: str, root: Path) -> None:
    subprocess.run(command(stage, root), cwd=ROOT, check=True, capture_output=True, timeout=600)


def kill_after(stage: str, root: Path, is_due) -> None:
    """Start the stage and kill it with SIGKILL as soon as `is_due(stage folder)`."""
    process = subprocess.Popen(
        command(stage, root), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 600
    while not any(is_due(folder) for folder in root.glob(f"stages/{stage}-*")):
        assert process.poll() is None, "the stage ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def has_steps(count: int):
    """True once the stage has logged `count` steps."""

    def is_due(folder: Path) -> bool:
        metrics = folder / "metrics.jsonl"
        return metrics.exists() and metrics.read_text().count("\n") >= count

    return is_due


def pointer(root: Path, stage: str) -> Pointer:
    recipe = load_recipe([ROOT / RECIPE], overrides=[f"storage.root={root}"])
    return finished_stages(recipe)[stage]


def weights(root: Path, stage: str) -> dict[str, torch.Tensor]:
    """Final weights of a stage, by their names in the checkpoint."""
    from megatron.core import dist_checkpointing

    from m1.model.parallel import initialize

    initialize()
    folder = Path(pointer(root, stage).uri) / "checkpoint"
    return dist_checkpointing.load_plain_tensors(str(folder))


@pytest.fixture
def uninterrupted(first_run) -> Path:
    return first_run[0]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("interrupted")


# Steps at the time of the kill lie before the first checkpoint, between two, and after the last.
@pytest.mark.parametrize(
    ("stage", "kills"),
    [
        ("data", [lambda folder: (folder / "output" / "tasks").exists()]),
        ("pretrain", [has_steps(1), has_steps(3), has_steps(6)]),
        ("sft", [has_steps(15)]),
        ("rl", [has_steps(1)]),
        ("evaluate", [lambda folder: any((folder / "partial").glob("*.jsonl"))]),
        ("register", [lambda folder: (folder / "output" / "hf").exists()]),
    ],
)
def test_a_killed_stage_goes_on_to_the_same_result(stage, kills, interrupted, uninterrupted):
    for is_due in kills:
        kill_after(stage, interrupted, is_due)
    finish(stage, interrupted)
    if stage in ("data", "evaluate", "register"):
        assert pointer(interrupted, stage).digest == pointer(uninterrupted, stage).digest
        return
    expected, found = weights(uninterrupted, stage), weights(interrupted, stage)
    assert expected.keys() == found.keys() and expected
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_a_killed_registration_leaves_one_version(interrupted):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{interrupted}/mlflow.db")
    assert len(client.search_model_versions("name = 'm1-mini'")) == 1


def test_metrics_of_a_killed_stage_have_every_step_once(interrupted):
    from m1.stage import read_metrics

    for stage, count in (("pretrain", 6), ("sft", 40), ("rl", 3)):
        folder = next(interrupted.glob(f"stages/{stage}-*"))
        steps = [line["step"] for line in read_metrics(folder / "metrics.jsonl")]
        assert steps == list(range(1, count + 1))
