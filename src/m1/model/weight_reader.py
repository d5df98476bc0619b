"""Reading of a checkpoint one parameter at a time."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from m1.model import checkpoint
from m1.model.weight_parts import Scratch, chunks_of, sizes_of
from m1.types import M1Error


class WeightReader:
    """Parameters of a checkpoint of any layout, each read when it is asked for.

    Memory is one parameter and the largest of the chunks it was stored as.
    """

    def __init__(self, folder: Path, model: MegatronModule) -> None:
        """Verify the checkpoint's files against their digests, and its shapes.

        Args:
            folder: The checkpoint.
            model: The skeleton of what it holds.

        Raises:
            M1Error: A file is missing or changed, or parameters are missing or differ in shape.
        """
        checkpoint.verify(folder)
        self._folder, self._places = folder, checkpoint.sharded_weights(model)
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._scratch = Scratch()
        metadata = FileSystemReader(str(folder)).read_metadata()
        self._tensors, self._files = _tensors(metadata), metadata.storage_data
        chunks = [
            chunk
            for name, parameter in model.named_parameters()
            for chunk in chunks_of(self._places[name], parameter)
        ]
        wrong = {chunk.key: None for chunk in chunks if not self._has(chunk)}
        if wrong:
            raise M1Error(
                f"checkpoint {folder} does not fit this [model]: it lacks, or has in another "
                f"shape, {', '.join(wrong)}. Use the [model] table that made it"
            )
        self.dtypes = {
            name: self._tensors[self._places[name].key].properties.dtype for name in self._shapes
        }

    def read(self, name: str) -> torch.Tensor:
        """One parameter in the dtype it is stored in, on the CPU; valid until the next one."""
        tensor = self._scratch.tensor(self._shapes[name], self.dtypes[name])
        for chunk in chunks_of(self._places[name], tensor):
            self._fill(self._scratch.alone(chunk.data).view(sizes_of(chunk)), chunk)
        return tensor

    def _has(self, chunk: ShardedTensor) -> bool:
        stored = self._tensors.get(chunk.key)
        return stored is not None and tuple(stored.size) == tuple(chunk.global_shape)

    def _fill(self, target: torch.Tensor, chunk: ShardedTensor) -> None:
        """Copy what stored chunks share with this one, however they were cut."""
        begin = chunk.global_offset
        for stored in self._tensors[chunk.key].chunks:
            bounds = [
                (max(a, b), min(a + m, b + n))
                for a, m, b, n in zip(
                    stored.offsets, stored.sizes, begin, target.shape, strict=True
                )
            ]
            if all(first < last for first, last in bounds):
                source = self._load(chunk.key, stored.offsets)
                target[_slices(bounds, begin)] = source[_slices(bounds, stored.offsets)]

    def _load(self, key: str, offset: torch.Size) -> torch.Tensor:
        place = self._files[MetadataIndex(key, offset)]
        with (self._folder / place.relative_path).open("rb") as file:
            content = cast(BinaryIO, _Slice(file, place.offset, place.length))
            return torch.load(content, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def stored_vocab_size(folder: Path) -> int:
    """Rows of the embedding in a checkpoint."""
    metadata = FileSystemReader(str(folder)).read_metadata()
    return int(_tensors(metadata)["embedding.word_embeddings.weight"].size[0])


def _tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    stored = metadata.state_dict_metadata
    return {key: what for key, what in stored.items() if isinstance(what, TensorStorageMetadata)}


def _slices(bounds: Sequence[tuple[int, int]], begin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for (a, b), o in zip(bounds, begin, strict=True))


class _Slice(io.RawIOBase):
    """Part of a file, seen as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, counted from the slice's start, from where it is, or from its end."""
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        """Bytes from the slice's start."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read on into `buffer`."""
        view = memoryview(buffer).cast("B")
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view[: max(0, self._length - self._at)])  # type: ignore[attr-defined]
        self._at += count
        return int(count)
