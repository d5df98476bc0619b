"""Writing of a checkpoint of weights one parameter at a time, resumable.

The format is that of `checkpoint.save_weights`: torch.distributed.checkpoint with megatron's names.
"""

import hashlib
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from m1.model import checkpoint, saving
from m1.model.journal import Journal, Sink, write_file
from m1.model.weight_parts import Scratch, chunks_of, sizes_of
from m1.storage import atomic_write, disk_errors

Extent = tuple[int, int]
"""Start and length in a file."""


def write_weights(
    folder: Path,
    model: MegatronModule,
    *,
    dtypes: Mapping[str, torch.dtype],
    fill: Callable[[str, torch.Tensor], None],
    origin: str,
    max_bytes: int,
) -> str:
    """Write a checkpoint of weights; an equal call goes on where a killed one stopped.

    Memory is one parameter.

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
    saving.require_absent(folder)
    under_way = folder.with_name(f".{folder.name}.partial")
    with disk_errors(folder.parent):
        under_way.mkdir(parents=True, exist_ok=True)
    parts = _Parts(model, dtypes, fill)
    groups = parts.groups(max_bytes)
    plan = hashlib.sha256(f"{origin} {groups} {list(dtypes.items())}".encode()).hexdigest()
    journal = Journal(under_way, plan, written="*.distcp")
    metadata = Metadata(state_dict_metadata={}, storage_data={})
    for number, names in enumerate(groups):
        path = under_way / f"__0_{number}.distcp"
        if not journal.has(path.name):
            write_file(path, partial(parts.write, names), journal)
        parts.describe(names, path.name, journal.note(path.name), metadata)
    with disk_errors(folder.parent):
        atomic_write(under_way / ".metadata", pickle.dumps(metadata))
        torch.save({}, under_way / "common.pt")  # megatron's name for what is not sharded
        save_config(CheckpointingConfig("torch_dist", 1), str(under_way))
        (under_way / saving.MARKER).unlink(missing_ok=True)
        return saving.complete(under_way, folder)


class _Parts:
    """What is stored of a model: its parameters' chunks, and objects that modules add."""

    def __init__(
        self,
        model: MegatronModule,
        dtypes: Mapping[str, torch.dtype],
        fill: Callable[[str, torch.Tensor], None],
    ) -> None:
        self._places = checkpoint.sharded_weights(model)
        self._parameters = {
            name: parameter.to(dtypes[name]) for name, parameter in model.named_parameters()
        }
        self._fill, self._scratch = fill, Scratch()

    def groups(self, max_bytes: int) -> list[list[str]]:
        """Names of parameters, file by file; objects have the last one."""
        groups: list[list[str]] = [[]]
        size = 0
        for name, parameter in self._parameters.items():
            if groups[-1] and size + parameter.nbytes > max_bytes:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += parameter.nbytes
        objects = [n for n, place in self._places.items() if isinstance(place, ShardedObject)]
        return [*groups, objects] if objects else groups

    def write(self, names: list[str], sink: Sink) -> list[Extent]:
        """Write a file; returns where each of its `_stored` lies."""
        extents = []
        for name in names:
            place = self._places[name]
            if isinstance(place, ShardedObject):
                extents.append(_append(sink, [place.data]))
                continue
            parameter = self._parameters[name]
            tensor = self._scratch.tensor(parameter.shape, parameter.dtype)
            self._fill(name, tensor)
            for chunk in chunks_of(place, tensor):
                data = self._scratch.alone(chunk.data).view(sizes_of(chunk))
                extents.append(_append(sink, data))
        return extents

    def _stored(self, name: str) -> list[ShardedObject | ShardedTensor]:
        place = self._places[name]
        if isinstance(place, ShardedObject):
            return [place]
        return chunks_of(place, self._parameters[name])

    def describe(
        self, names: list[str], file: str, extents: list[Extent], metadata: Metadata
    ) -> None:
        """Enter the content of a file into torch's metadata."""
        stored = [part for name in names for part in self._stored(name)]
        for part, (start, length) in zip(stored, extents, strict=True):
            if isinstance(part, ShardedObject):
                index = MetadataIndex(part.unique_key)
                metadata.state_dict_metadata[part.unique_key] = BytesStorageMetadata()
            else:
                index = _describe_chunk(part, metadata)
            metadata.storage_data[index] = _StorageInfo(file, start, length)


def _describe_chunk(chunk: ShardedTensor, metadata: Metadata) -> MetadataIndex:
    offset, sizes = torch.Size(chunk.global_offset), torch.Size(sizes_of(chunk))
    whole = TensorStorageMetadata(
        TensorProperties(dtype=chunk.dtype), torch.Size(chunk.global_shape), chunks=[]
    )
    known = metadata.state_dict_metadata.setdefault(chunk.key, whole)
    assert isinstance(known, TensorStorageMetadata)
    known.chunks.append(ChunkStorageMetadata(offset, sizes))
    return MetadataIndex(chunk.key, offset)


def _append(sink: Sink, value: Any) -> Extent:
    start = sink.size
    torch.save(value, cast(BinaryIO, sink))  # it calls write alone
    return start, sink.size - start
