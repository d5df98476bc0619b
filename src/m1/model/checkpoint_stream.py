"""Checkpoints of weights read and written one parameter at a time, without the model in memory.

The format is that of `checkpoint.save_weights` (torch.distributed.checkpoint with megatron's
names), so either side may have been written by the other. Where a parameter lies in the global
model is asked of a skeleton: the model on torch's meta device, which has shapes and no values.
"""

import hashlib
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial as partial_method
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from m1.config.schema import ModelConfig
from m1.model import checkpoint
from m1.model.build import build_model
from m1.model.journal import JOURNAL, Journal, Sink, write_file
from m1.storage import atomic_write, disk_errors
from m1.types import M1Error

FILE_BYTES = 5_000_000_000


def skeleton(config: ModelConfig) -> MegatronModule:
    """The model without values. Requires `m1.model.parallel.initialize` and `vocab_size`."""
    assert config.vocab_size is not None
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return build_model(config, vocab_size=config.vocab_size, seed=1)


class WeightReader:
    """Parameters of a checkpoint, each read when it is asked for."""

    def __init__(self, folder: Path, model: MegatronModule) -> None:
        """Verify the checkpoint's files against their digests, and its shapes.

        Raises:
            M1Error: A file is missing or changed, or parameters are missing or differ in shape.
        """
        checkpoint.verify(folder)
        self._folder, self._sharded = folder, checkpoint.sharded_weights(model)
        self._parameters = dict(model.named_parameters())
        metadata = FileSystemReader(str(folder)).read_metadata()
        self._stored, self._places = _tensors(metadata), metadata.storage_data
        chunks = [
            chunk
            for name, parameter in self._parameters.items()
            for chunk in _chunks(self._sharded[name], parameter)
        ]
        wrong = {chunk.key: None for chunk in chunks if not self._has(chunk)}
        if wrong:
            raise M1Error(
                f"checkpoint {folder} does not fit this [model]: it lacks, or has in another "
                f"shape, {', '.join(wrong)}. Use the [model] table that made it"
            )
        self.dtypes = {
            name: self._stored[self._sharded[name].key].properties.dtype
            for name in self._parameters
        }

    def read(self, name: str) -> torch.Tensor:
        """One parameter in the dtype it is stored in, on the CPU."""
        tensor = torch.empty(self._parameters[name].shape, dtype=self.dtypes[name])
        place = _with_data(self._sharded[name], tensor)
        if not isinstance(place, ShardedTensorFactory):
            self._fill(place)
            return tensor
        built = place.build()
        for chunk in nested_values(built):
            self._fill(chunk)
        return place.merge_fn(dict_list_map_outplace(lambda chunk: chunk.data, built))  # type: ignore[no-any-return]

    def _has(self, chunk: ShardedTensor) -> bool:
        stored = self._stored.get(chunk.key)
        return stored is not None and tuple(stored.size) == tuple(chunk.global_shape)

    def _fill(self, chunk: ShardedTensor) -> None:
        """Copy what stored chunks share with this one, however they were cut."""
        offset, sizes = chunk.global_offset, _sizes(chunk)
        target = chunk.data.view(sizes)
        for stored in self._stored[chunk.key].chunks:
            theirs = list(zip(stored.offsets, stored.sizes, strict=True))
            ours = list(zip(offset, sizes, strict=True))
            both = [
                (max(a, b), min(a + m, b + n)) for (a, m), (b, n) in zip(theirs, ours, strict=True)
            ]
            if all(begin < end for begin, end in both):
                source = self._load(chunk.key, stored.offsets)
                target[_slices(both, offset)] = source[_slices(both, stored.offsets)]

    def _load(self, key: str, offset: torch.Size) -> torch.Tensor:
        place = self._places[MetadataIndex(key, offset)]
        with (self._folder / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            content = io.BytesIO(file.read(place.length))
        return torch.load(content, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def stored_vocab_size(folder: Path) -> int:
    """Rows of the embedding in a checkpoint."""
    metadata = FileSystemReader(str(folder)).read_metadata()
    return int(_tensors(metadata)["embedding.word_embeddings.weight"].size[0])


def _tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    stored = metadata.state_dict_metadata
    return {key: what for key, what in stored.items() if isinstance(what, TensorStorageMetadata)}


def write_weights(
    folder: Path,
    model: MegatronModule,
    *,
    dtypes: Mapping[str, torch.dtype],
    fill: Callable[[str, torch.Tensor], None],
    origin: str,
    max_bytes: int = FILE_BYTES,
) -> str:
    """Write a checkpoint of weights; an equal call goes on where a killed one stopped.

    Args:
        folder: Must not exist; appears when whole.
        model: The skeleton.
        dtypes: Dtype to store each parameter in.
        fill: Puts the values of the named parameter into an uninitialised CPU tensor.
        origin: Identity of the values.
        max_bytes: Size at which a new file is begun.

    Returns:
        The checkpoint's digest.

    Raises:
        M1Error: The folder exists, another conversion was begun in its place, or the disk is full.
    """
    if folder.exists():
        raise M1Error(
            f"{folder} exists already; a checkpoint is never overwritten. Delete it first"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    with disk_errors(folder.parent):
        partial.mkdir(parents=True, exist_ok=True)
    parts = _Parts(model, dtypes, fill)
    groups = parts.groups(max_bytes)
    plan = hashlib.sha256(f"{origin} {groups} {list(dtypes.items())}".encode()).hexdigest()
    journal = Journal(partial, plan, written="*.distcp")
    for number, names in enumerate(groups):
        path = partial / f"__0_{number}.distcp"
        if not journal.has(path.name):
            write_file(path, partial_method(parts.write, names), journal)
        parts.note(path.name, names, journal.note(path.name))
    parts.write_objects(partial / f"__0_{len(groups)}.distcp")
    with disk_errors(folder.parent):
        atomic_write(partial / ".metadata", pickle.dumps(parts.metadata))
        torch.save({}, partial / "common.pt")  # megatron's name for what is not sharded
        save_config(CheckpointingConfig("torch_dist", 1, "torch", 1), str(partial))
        (partial / JOURNAL).unlink()
        return checkpoint.complete(partial, folder)


class _Parts:
    """The chunks that a model's parameters are stored as, and where each was written.

    A chunk is what torch.save makes of a tensor, which is a slab of a global tensor: the gate or
    the up projection of one expert, for example.
    """

    def __init__(
        self,
        model: MegatronModule,
        dtypes: Mapping[str, torch.dtype],
        fill: Callable[[str, torch.Tensor], None],
    ) -> None:
        self._sharded = checkpoint.sharded_weights(model)
        self._parameters = {
            name: parameter.to(dtypes[name]) for name, parameter in model.named_parameters()
        }
        self._fill = fill
        self.metadata = Metadata(state_dict_metadata={}, storage_data={})

    def groups(self, max_bytes: int) -> list[list[str]]:
        """Names of parameters, file by file."""
        groups: list[list[str]] = [[]]
        size = 0
        for name, parameter in self._parameters.items():
            if groups[-1] and size + parameter.nbytes > max_bytes:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += parameter.nbytes
        return groups

    def write(self, names: list[str], sink: Sink) -> list[tuple[int, int]]:
        """Write parameters; returns start and length of every chunk."""
        extents = []
        for name in names:
            tensor = torch.empty_like(self._parameters[name], device="cpu")
            self._fill(name, tensor)
            for chunk in _chunks(self._sharded[name], tensor):
                extents.append(_append(sink, chunk.data.view(_sizes(chunk)).contiguous()))
        return extents

    def note(self, file: str, names: list[str], extents: list[tuple[int, int]]) -> None:
        """Enter the chunks of a file into the metadata."""
        chunks = [
            chunk
            for name in names
            for chunk in _chunks(self._sharded[name], self._parameters[name])
        ]
        for chunk, (start, length) in zip(chunks, extents, strict=True):
            offset, size = torch.Size(chunk.global_offset), torch.Size(_sizes(chunk))
            whole = TensorStorageMetadata(
                TensorProperties(dtype=chunk.dtype), torch.Size(chunk.global_shape), chunks=[]
            )
            known = self.metadata.state_dict_metadata.setdefault(chunk.key, whole)
            assert isinstance(known, TensorStorageMetadata)
            known.chunks.append(ChunkStorageMetadata(offset, size))
            place = _StorageInfo(file, start, length)
            self.metadata.storage_data[MetadataIndex(chunk.key, offset)] = place

    def write_objects(self, path: Path) -> None:
        """Write what the modules store beside parameters, and enter it into the metadata."""
        objects = [base for base in self._sharded.values() if isinstance(base, ShardedObject)]

        def write(sink: Sink) -> None:
            for base in objects:
                start, length = _append(sink, [base.data])
                self.metadata.state_dict_metadata[base.unique_key] = BytesStorageMetadata()
                place = _StorageInfo(path.name, start, length)
                self.metadata.storage_data[MetadataIndex(base.unique_key)] = place

        write_file(path, write)


def _chunks(place: Any, tensor: torch.Tensor) -> list[ShardedTensor]:
    """The slabs of global tensors that a parameter is stored as."""
    place = _with_data(place, tensor)
    return list(
        nested_values(place.build() if isinstance(place, ShardedTensorFactory) else [place])
    )


def _sizes(chunk: ShardedTensor) -> tuple[int, ...]:
    """Shape of a slab with as many axes as the global tensor."""
    return (*(1,) * chunk.prepend_axis_num, *chunk.local_shape)


def _slices(bounds: Sequence[tuple[int, int]], offset: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for (a, b), o in zip(bounds, offset, strict=True))


def _with_data(place: Any, tensor: torch.Tensor) -> Any:
    """A parameter's place in the global model, with values."""
    if isinstance(place, ShardedTensorFactory):
        return replace(place, data=tensor)
    return replace(place, data=tensor, dtype=tensor.dtype)


def _append(sink: Sink, value: Any) -> tuple[int, int]:
    start = sink.size
    torch.save(value, cast(BinaryIO, sink))  # it calls write alone
    return start, sink.size - start
