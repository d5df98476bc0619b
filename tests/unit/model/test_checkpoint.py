import json
import shutil

import pytest
import torch

from m1.config.schema import OptimizerConfig, ParallelConfig
from m1.model import checkpoint
from m1.model.build import build_model
from m1.train.microbatch import MicroBatch
from m1.train.trainer import Trainer, cross_entropy
from m1.types import M1Error


@pytest.fixture(scope="module")
def make_trainer(process_group, tiny_config):
    config = tiny_config.model_copy(
        update={"num_layers": 2, "layer_pattern": ("lightning", "softmax")}
    )

    def make(seed=1):
        optimizer = OptimizerConfig(lr=1e-2)
        return Trainer(config, optimizer, vocab_size=64, seed=seed, parallel=ParallelConfig())

    return make


def train(trainer, steps):
    """One update per step on a batch of its own; returns the gradient norms."""
    norms = []
    for step in steps:
        tokens = torch.randint(64, (13,), generator=torch.Generator().manual_seed(step))
        batch = MicroBatch(
            tokens=tokens[:-1],
            targets=tokens[1:],
            lengths=torch.tensor([5, 7]),
            weights=torch.full((12,), 1 / 12),
        )
        norms.append(trainer.update([batch], cross_entropy, lr=1e-2 / (step + 1)).grad_norm)
    return norms


def tensors(trainer):
    """Copies of all weights and of the optimizer's moments and step counts."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    found = {name: parameter.detach().clone() for parameter, name in names.items()}
    for number, optimizer in enumerate(trainer.optimizer.chained_optimizers):
        for parameter in optimizer.model_param_group_index_map:
            states = optimizer._get_main_param_and_optimizer_states(parameter)
            for key, value in states.items():
                found[f"{names[parameter]}/{key}"] = value.detach().clone()
        for group in optimizer.param_groups:
            found[f"step {number}"] = torch.tensor(group.get("step", 0))
    return found


def assert_bitwise_equal(actual, expected):
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.fixture(scope="module")
def saved(make_trainer, tmp_path_factory):
    """A checkpoint after two updates, its digest, and what it holds. No test may change it."""
    trainer = make_trainer()
    train(trainer, range(2))
    folder = tmp_path_factory.mktemp("saved") / "step_00000002"
    digest = trainer.save(folder, {"step": 2, "cursor": 17})
    return folder, digest, tensors(trainer)


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / saved[0].name)


def test_a_checkpoint_restores_weights_moments_and_state_bitwise(saved, make_trainer):
    folder, _, expected = saved
    trainer = make_trainer(seed=2)
    train(trainer, range(5, 6))
    assert trainer.load(folder) == {"step": 2, "cursor": 17}
    restored = tensors(trainer)
    assert any(name.endswith("exp_avg_sq") for name in restored)
    assert_bitwise_equal(restored, expected)


def test_resumed_training_equals_uninterrupted_training_bitwise(saved, make_trainer):
    uninterrupted, resumed = make_trainer(), make_trainer(seed=2)
    norms = train(uninterrupted, range(4))
    resumed.load(saved[0])
    assert train(resumed, range(2, 4)) == norms[2:]
    assert_bitwise_equal(tensors(resumed), tensors(uninterrupted))


def test_a_fresh_trainer_resumes_without_an_update_of_its_own(saved, make_trainer):
    trainer = make_trainer(seed=3)
    trainer.load(saved[0])
    assert_bitwise_equal(tensors(trainer), saved[2])


def test_weights_alone_can_be_handed_to_the_next_stage(make_trainer, tmp_path):
    first, second = make_trainer(), make_trainer(seed=2)
    train(first, range(2))
    first.save_weights(tmp_path / "checkpoint")
    second.load_weights(tmp_path / "checkpoint")
    weights = dict(first.model.named_parameters())
    handed = dict(second.model.named_parameters())
    assert all(torch.equal(handed[name], weight) for name, weight in weights.items())
    train(second, range(1))  # from these weights, not from the optimizer's older copies
    moved = max(float((p - weights[n]).detach().abs().max()) for n, p in handed.items())
    assert 0 < moved < 0.02  # Adam's first update is at most lr = 0.01 and weight decay


def test_the_manifest_lists_every_other_file(saved):
    folder, digest, _ = saved
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    listed = json.loads((folder / checkpoint.MARKER).read_text())["files"]
    assert listed.keys() == files - {checkpoint.MARKER}
    assert len(digest) == 64
    checkpoint.verify(folder)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_named(copied, damage):
    files = [p for p in copied.rglob("*") if p.is_file() and p.name != checkpoint.MARKER]
    assert len(files) >= 3
    for path in files:
        content = path.read_bytes()
        damaged = bytearray(content)
        if damage == "flip":
            damaged[len(content) // 2] ^= 1
        path.unlink()
        if damage != "remove":
            path.write_bytes(damaged[:-1] if damage == "truncate" else damaged)
        what = "is missing" if damage == "remove" else "does not have the content"
        name = path.relative_to(copied)
        with pytest.raises(M1Error, match=f"corrupt: {name} {what}"):
            checkpoint.verify(copied)
        path.write_bytes(content)
    checkpoint.verify(copied)


def test_a_damaged_checkpoint_changes_nothing_in_the_trainer(copied, make_trainer):
    trainer = make_trainer()
    before = tensors(trainer)
    next(copied.glob("*.distcp")).write_bytes(b"")
    with pytest.raises(M1Error, match="corrupt"):
        trainer.load(copied)
    with pytest.raises(M1Error, match="corrupt"):
        trainer.load_weights(copied)
    assert_bitwise_equal(tensors(trainer), before)


def test_a_checkpoint_without_its_marker_is_incomplete(copied, make_trainer):
    (copied / checkpoint.MARKER).unlink()
    with pytest.raises(M1Error, match=r"not a complete checkpoint.*complete\.json"):
        make_trainer().load(copied)
    assert checkpoint.latest(copied.parent) is None


def marked(parent, *steps):
    for step in steps:
        folder = checkpoint.step_folder(parent, step)
        folder.mkdir(parents=True)
        (folder / checkpoint.MARKER).write_text('{"files": {}}')


def names(parent):
    return sorted(path.name for path in parent.iterdir())


def test_the_latest_checkpoint_has_the_highest_step(tmp_path):
    assert checkpoint.latest(tmp_path / "absent") is None
    marked(tmp_path, 9, 10, 100)
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000100"


def test_the_latest_checkpoint_is_a_complete_one(tmp_path):
    marked(tmp_path, 1)
    checkpoint.step_folder(tmp_path, 3).mkdir()
    partial = tmp_path / ".step_00000002.partial"
    partial.mkdir()
    (partial / checkpoint.MARKER).write_text('{"files": {}}')
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000001"


def test_pruning_keeps_the_newest_and_removes_leftovers(tmp_path):
    marked(tmp_path, 2, 4, 6, 8)
    (tmp_path / ".step_00000010.partial").mkdir()
    (tmp_path / "other").mkdir()
    checkpoint.prune(tmp_path, keep=2)
    assert names(tmp_path) == ["other", "step_00000006", "step_00000008"]


def test_pruning_fewer_than_it_keeps_removes_none(tmp_path):
    marked(tmp_path, 2)
    checkpoint.prune(tmp_path, keep=3)
    assert names(tmp_path) == ["step_00000002"]


def test_a_crash_while_writing_leaves_the_checkpoint_before_it(copied, saved, make_trainer):
    # What a killed process leaves: some files under the hidden name, and no marker.
    parent = copied.parent
    partial = parent / ".step_00000004.partial"
    partial.mkdir()
    (partial / "__0_0.distcp").write_bytes(b"half of a shard")

    trainer = make_trainer(seed=2)
    assert checkpoint.latest(parent) == copied
    assert trainer.load(copied)["step"] == 2
    train(trainer, range(2, 4))
    trainer.save(checkpoint.step_folder(parent, 4), {"step": 4})
    assert names(parent) == ["step_00000002", "step_00000004"]
    assert make_trainer().load(checkpoint.latest(parent)) == {"step": 4}


def test_a_refused_folder_is_reported_and_the_checkpoint_before_it_stays(copied, make_trainer):
    (copied.parent / "file").write_text("")
    with pytest.raises(M1Error, match="file"):
        make_trainer().save(copied.parent / "file" / "step_00000004", {"step": 4})
    checkpoint.verify(copied)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 64}, r"has shape \[.*32\] there and \[.*64\] in the model"),
        ({"num_layers": 1, "layer_pattern": ("lightning",)}, r"the model lacks decoder.layers.1"),
        (
            {"num_layers": 3, "layer_pattern": ("lightning", "softmax", "lightning")},
            r"it lacks decoder.layers.2",
        ),
        ({"layer_pattern": ("softmax", "lightning")}, r"it lacks decoder.layers.0.self_attention"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(saved, tiny_config, change, words):
    own = {"num_layers": 2, "layer_pattern": ("lightning", "softmax")}
    other = build_model(tiny_config.model_copy(update=own | change), vocab_size=64, seed=1)
    with pytest.raises(M1Error, match=rf"is not of this \[model\]: .*{words}"):
        checkpoint.load_weights(saved[0], other)


def test_a_checkpoint_of_another_vocabulary_is_refused(saved, tiny_config):
    own = {"num_layers": 2, "layer_pattern": ("lightning", "softmax")}
    other = build_model(tiny_config.model_copy(update=own), vocab_size=128, seed=1)
    with pytest.raises(M1Error, match=r"has shape \[64, 32\] there and \[128, 32\] in the model"):
        checkpoint.load_weights(saved[0], other)


def test_a_checkpoint_in_the_background_holds_what_was_when_it_began(saved, make_trainer, tmp_path):
    trainer, ended = make_trainer(seed=2), []
    trainer.load(saved[0])
    folder = tmp_path / "step_00000002"
    trainer.save_in_background(folder, {"step": 2, "cursor": 17}, then=lambda: ended.append(1))
    train(trainer, range(2, 4))
    assert not ended
    trainer.finish_saves(wait=True)
    assert ended == [1] and names(tmp_path) == [folder.name]
    restored = make_trainer(seed=3)
    assert restored.load(folder) == {"step": 2, "cursor": 17}
    assert_bitwise_equal(tensors(restored), saved[2])
    assert_bitwise_equal(tensors(trainer), after_four(saved, make_trainer))


def after_four(saved, make_trainer):
    trainer = make_trainer(seed=4)
    trainer.load(saved[0])
    train(trainer, range(2, 4))
    return tensors(trainer)


def test_a_second_checkpoint_waits_for_the_one_under_way(make_trainer, tmp_path):
    trainer, ended = make_trainer(), []
    for step in (1, 2, 3):
        folder = checkpoint.step_folder(tmp_path, step)
        trainer.save_in_background(folder, {"step": step}, then=lambda s=step: ended.append(s))
        assert ended == list(range(1, step))
    trainer.finish_saves(wait=True)
    trainer.finish_saves(wait=True)
    assert ended == [1, 2, 3]
    assert [make_trainer().load(tmp_path / name)["step"] for name in names(tmp_path)] == [1, 2, 3]


def test_a_failure_in_the_background_is_raised_and_leaves_the_checkpoint_before_it(
    copied, make_trainer
):
    trainer, parent, ended = make_trainer(), copied.parent, []
    trainer.save_in_background(parent / "step_00000004", {}, then=lambda: ended.append(1))
    shutil.rmtree(parent / ".step_00000004.partial")  # as a storage that goes away
    with pytest.raises((M1Error, OSError)):
        trainer.finish_saves(wait=True)
    assert names(parent) == [copied.name] and not ended
    trainer.finish_saves(wait=True)
    trainer.save(parent / "step_00000006", {"step": 6})
    checkpoint.verify(parent / "step_00000006")
