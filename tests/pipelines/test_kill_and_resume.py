"""kill -9 inside a stage, then the same stage again: the same weights as without the kill."""

from pathlib import Path

import pytest
import torch
from killing import ROOT, kill_stages  # beside this file

from m1.config.loading import load_recipe
from m1.launch import finished_stages
from m1.types import Pointer

RECIPE = "tests/recipes/mini.toml"
# Steps at the time of the kill lie before the first checkpoint, between two, and after the last.
KILLS = {
    "data": [{"file": "output/tasks"}],
    "pretrain": [{"steps": 1}, {"steps": 3}, {"steps": 6}],
    "sft": [{"steps": 15}],
    "rl": [{"steps": 1}],
    "evaluate": [{"file": "partial/*.jsonl"}],
    "register": [{"file": "output/hf"}],
}


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
    """A run root in which every stage was killed and run again."""
    root = tmp_path_factory.mktemp("interrupted")
    kill_stages(root, [{"stage": s, "sets": [], "kills": kills} for s, kills in KILLS.items()])
    return root


@pytest.mark.parametrize("stage", KILLS)
def test_a_killed_stage_goes_on_to_the_same_result(stage, interrupted, uninterrupted):
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
