"""Checkpoints written and read one parameter at a time against those of the whole model."""

import io
import pickle

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from m1.model import checkpoint, saving
from m1.model.weight_parts import Scratch, skeleton
from m1.model.weight_reader import WeightReader, stored_vocab_size
from m1.model.weight_writer import write_weights
from m1.types import M1Error


@pytest.fixture
def model(make_model, tiny_config):
    return make_model(tiny_config)


@pytest.fixture
def bones(tiny_config, process_group):
    return skeleton(tiny_config.model_copy(update={"vocab_size": 64}))


def write(folder, bones, model, **changes):
    parameters = dict(model.named_parameters())

    def fill(name, tensor):
        tensor.copy_(parameters[name].detach())

    arguments = {
        "dtypes": {name: torch.float32 for name in parameters},
        "fill": fill,
        "origin": "test",
        "max_bytes": 20_000,
    }
    return write_weights(folder, bones, **{**arguments, **changes})


def test_a_skeleton_has_no_values_and_leaves_random_numbers_alone(tiny_config, process_group):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    config = tiny_config.model_copy(update={"vocab_size": 64, "precision": "bf16"})
    assert all(parameter.is_meta for parameter in skeleton(config).parameters())
    assert torch.equal(torch.rand(2), expected)


def test_what_is_streamed_the_model_reads(model, bones, make_model, tiny_config, tmp_path):
    write(tmp_path / "checkpoint", bones, model)
    other = make_model(tiny_config, seed=2)
    checkpoint.load_weights(tmp_path / "checkpoint", other)
    expected = dict(model.named_parameters())
    assert all(torch.equal(expected[name], p) for name, p in other.named_parameters())


def test_what_the_model_writes_is_read_as_a_stream(model, bones, tmp_path):
    checkpoint.save_weights(tmp_path / "checkpoint", model)
    reader = WeightReader(tmp_path / "checkpoint", bones)
    assert stored_vocab_size(tmp_path / "checkpoint") == 64
    for name, parameter in model.named_parameters():
        assert torch.equal(reader.read(name), parameter)


def cut_in_two(folder, key):
    """Store a tensor as its upper and lower half, as two tensor-parallel ranks would."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    (index,) = (i for i in metadata.storage_data if i.fqn == key)
    place = metadata.storage_data.pop(index)
    blob = (folder / place.relative_path).read_bytes()[place.offset :][: place.length]
    tensor = torch.load(io.BytesIO(blob), weights_only=True)
    whole = metadata.state_dict_metadata[key]
    whole.chunks.clear()
    for number, half in enumerate(tensor.chunk(2)):
        offset = torch.Size([number * half.shape[0], *(0,) * (half.ndim - 1)])
        torch.save(half.clone(), folder / f"half{number}.distcp")
        length = (folder / f"half{number}.distcp").stat().st_size
        whole.chunks.append(ChunkStorageMetadata(offset, half.shape))
        stored = _StorageInfo(f"half{number}.distcp", 0, length)
        metadata.storage_data[MetadataIndex(key, offset)] = stored
    path.write_bytes(pickle.dumps(metadata))
    (folder / checkpoint.MARKER).unlink()
    saving.complete(folder, folder.with_name("cut"))


def test_a_parameter_stored_in_other_chunks_is_put_together(model, bones, tmp_path):
    checkpoint.save_weights(tmp_path / "checkpoint", model)
    name = "decoder.layers.7.self_attention.linear_qkv.weight"
    cut_in_two(tmp_path / "checkpoint", name)
    reader = WeightReader(tmp_path / "cut", bones)
    assert torch.equal(reader.read(name), dict(model.named_parameters())[name])


def test_parameters_keep_the_dtype_they_are_stored_in(model, bones, tmp_path):
    dtypes = {name: torch.bfloat16 for name, _ in model.named_parameters()}
    write(tmp_path / "checkpoint", bones, model, dtypes=dtypes)
    reader = WeightReader(tmp_path / "checkpoint", bones)
    for name, parameter in model.named_parameters():
        found = reader.read(name)
        assert found.dtype == torch.bfloat16 and torch.equal(found, parameter.bfloat16())
    halves = sum(path.stat().st_size for path in (tmp_path / "checkpoint").glob("*.distcp"))
    write(tmp_path / "whole", bones, model)
    assert halves < sum(path.stat().st_size for path in (tmp_path / "whole").glob("*.distcp"))


def test_a_writer_that_failed_goes_on_and_another_origin_is_refused(model, bones, tmp_path):
    asked = []

    def failing(name, tensor):
        asked.append(name)
        if len(asked) == 30:
            raise RuntimeError("stop")
        tensor.copy_(dict(model.named_parameters())[name].detach())

    with pytest.raises(RuntimeError):
        write(tmp_path / "checkpoint", bones, model, fill=failing)
    assert not (tmp_path / "checkpoint").exists()
    with pytest.raises(M1Error, match="another source"):
        write(tmp_path / "checkpoint", bones, model, origin="another")
    first = len(asked)
    write(tmp_path / "checkpoint", bones, model, fill=lambda *a: failing(*a))
    assert len(asked) - first < len(list(model.parameters()))
    assert write(tmp_path / "whole", bones, model) == write(tmp_path / "again", bones, model)
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "checkpoint").iterdir()}


def test_scratch_memory_is_used_again_and_views_are_cut_out():
    scratch = Scratch()
    first = scratch.tensor((4, 3), torch.float32)
    first.copy_(torch.arange(12.0).view(4, 3))
    alone = scratch.alone(first[2:])
    assert alone.untyped_storage().nbytes() == 24 and torch.equal(alone, first[2:])
    second = scratch.tensor((2, 3), torch.bfloat16)
    assert second.data_ptr() == first.data_ptr()
    with pytest.raises(AssertionError):
        scratch.alone(torch.zeros(3))
