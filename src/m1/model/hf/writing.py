"""Writing of safetensors shards, tensor by tensor, so that a killed conversion goes on.

The index comes last: a folder without it is not complete.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1.model.hf.layouts import Shape
from m1.model.hf.reading import INDEX, SINGLE
from m1.model.journal import JOURNAL, Bytes, Journal, Sink, write_file
from m1.storage import atomic_write, disk_errors

SHARD_BYTES = 5_000_000_000
_SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


@dataclass(frozen=True)
class Item:
    """One tensor to write."""

    name: str
    dtype: str
    """As safetensors names it, such as BF16."""
    shape: Shape
    num_bytes: int
    chunks: Callable[[], Iterator[Bytes]]
    """Its bytes, row-major; called when its turn comes."""


@dataclass(frozen=True)
class Shard:
    """One file to write."""

    name: str
    items: tuple[Item, ...]

    @property
    def header(self) -> bytes:
        """What stands before the tensors' bytes."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for item in self.items:
            end = start + item.num_bytes
            entries[item.name] = {
                "dtype": item.dtype,
                "shape": list(item.shape),
                "data_offsets": [start, end],
            }
            start = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def write(self, sink: Sink) -> None:
        """Write header and tensors."""
        sink.write(self.header)
        for item in self.items:
            for chunk in item.chunks():
                sink.write(chunk)


def plan_shards(items: Sequence[Item], *, max_bytes: int) -> list[Shard]:
    """Fill files in order; a tensor larger than `max_bytes` has a file of its own.

    Within a file wide elements come first, which keeps every tensor aligned.
    """
    groups: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if groups[-1] and size + item.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.num_bytes
    count = len(groups)
    names = [SINGLE] if count == 1 else [_shard_name(i, count) for i in range(1, count + 1)]
    return [
        Shard(name, tuple(sorted(group, key=_itemsize, reverse=True)))
        for name, group in zip(names, groups, strict=True)
    ]


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _itemsize(item: Item) -> int:
    return item.num_bytes // max(math.prod(item.shape), 1)


def write_weights(
    folder: Path, items: Sequence[Item], *, max_bytes: int = SHARD_BYTES, origin: str | None = None
) -> None:
    """Write all tensors below `folder`, in several files with an index or in one.

    Args:
        folder: Is created; other files in it stay.
        items: In file order.
        max_bytes: Size at which a new file is begun.
        origin: Identity of what `items` read. With it the conversion can be resumed by an equal
            call; without, everything is written anew, over earlier weights.

    Raises:
        M1Error: The folder holds weights of another origin, or the disk is full.
    """
    shards = plan_shards(items, max_bytes=max_bytes)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if origin is None:
        (folder / INDEX).unlink(missing_ok=True)
        (folder / JOURNAL).unlink(missing_ok=True)
        journal = None
    else:
        journal = Journal(folder, _plan_digest(shards, origin), written="model*.safetensors")
    for shard in shards:
        if journal is None or not journal.has(shard.name):
            write_file(folder / shard.name, shard.write, journal)
    for path in folder.iterdir():
        if _SHARD_NAME.fullmatch(path.name) and path.name not in {shard.name for shard in shards}:
            path.unlink()
    if len(shards) > 1:
        atomic_write(folder / INDEX, _index(shards))


def _index(shards: Sequence[Shard]) -> bytes:
    total = sum(item.num_bytes for shard in shards for item in shard.items)
    weight_map = {item.name: shard.name for shard in shards for item in shard.items}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(content, indent=2).encode() + b"\n"


def _plan_digest(shards: Sequence[Shard], origin: str) -> str:
    digest = hashlib.sha256(origin.encode())
    for shard in shards:
        digest.update(shard.name.encode() + shard.header)
    return digest.hexdigest()
