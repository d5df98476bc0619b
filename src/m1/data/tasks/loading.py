"""Reading a public layout from a folder, an S3 prefix or the hub."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from m1.data.tasks.files import read_tasks
from m1.data.tasks.layouts import LAYOUTS, UnusableRow
from m1.storage import open_storage
from m1.types import M1Error, Task

_ENDINGS = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Loaded:
    """Tasks of a set, and why the other rows are none."""

    tasks: tuple[Task, ...]
    skipped: dict[str, int]


def load_tasks(uri: str, *, layout: str, max_tasks: int | None = None) -> list[Task]:
    """Tasks of a set: of a file of ours (`layout` m1), or of a public layout; see `load_layout`.

    Raises:
        M1Error: There is no such file, or nothing readable in it.
    """
    if layout != "m1":
        return list(load_layout(layout, uri, max_tasks=max_tasks).tasks)
    path = Path(uri.removeprefix("file://"))
    if not path.is_file():
        raise M1Error(f"{uri} is not a file; layout 'm1' reads our JSONL or Parquet")
    return read_tasks(path)[:max_tasks]


def load_layout(layout: str, uri: str, *, max_tasks: int | None = None) -> Loaded:
    """Tasks of a public set.

    Args:
        layout: One of `m1.data.tasks.layouts.LAYOUTS`.
        uri: A folder or file, `s3://bucket/prefix`, or `hub:owner/name[@revision]`, downloaded by
            huggingface_hub. Files end in .jsonl, .json (a list) or .parquet; others are passed by.
        max_tasks: Stop after so many.

    Raises:
        M1Error: The layout is unknown, or nothing readable is there.
    """
    if layout not in LAYOUTS:
        raise M1Error(f"layout {layout!r} is not known; known: {', '.join(sorted(LAYOUTS))}")
    tasks: list[Task] = []
    skipped: Counter[str] = Counter()
    num_files = 0
    for name, stream in _files(uri):
        num_files += 1
        with stream:
            for row in _rows(name, stream, skipped):
                if len(tasks) == max_tasks:
                    return Loaded(tuple(tasks), dict(skipped))
                try:
                    tasks.append(LAYOUTS[layout](row))
                except UnusableRow as error:
                    skipped[str(error)] += 1
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    skipped[f"malformed_{type(error).__name__}"] += 1
    if not num_files:
        raise M1Error(f"{uri} holds no file that ends in {', '.join(_ENDINGS)}; give their folder")
    return Loaded(tuple(tasks), dict(skipped))


def _files(uri: str) -> Iterator[tuple[str, BinaryIO]]:
    if uri.startswith("hub:"):
        uri = _downloaded(uri.removeprefix("hub:"))
    path = Path(uri.removeprefix("file://"))
    if "://" not in uri and path.is_file():
        yield path.name, path.open("rb")
        return
    if "://" not in uri and not path.is_dir():
        raise M1Error(f"{uri} is neither a file nor a folder; correct it")
    storage = open_storage(uri)
    for key in storage.list():
        if PurePosixPath(key).suffix in _ENDINGS:
            yield key, storage.open_read(key)


def _downloaded(name: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    patterns = [f"*{ending}" for ending in _ENDINGS]
    try:
        return str(
            snapshot_download(
                repository, repo_type="dataset", revision=revision or None, allow_patterns=patterns
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise M1Error(
            f"the hub did not give {repository} ({type(error).__name__}); download it "
            f"elsewhere and "
            "give its folder or an S3 prefix"
        ) from error


def _rows(name: str, stream: BinaryIO, skipped: Counter[str]) -> Iterator[dict[str, Any]]:
    for row in _values(name, stream, skipped):
        if isinstance(row, dict):
            yield row
        else:
            skipped["no_object"] += 1


def _values(name: str, stream: BinaryIO, skipped: Counter[str]) -> Iterator[Any]:
    if name.endswith(".parquet"):
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(stream).iter_batches():
            yield from batch.to_pylist()
        return
    if name.endswith(".json"):
        try:
            whole = json.load(stream)
        except ValueError:
            skipped["invalid_json"] += 1
            return
        yield from whole if isinstance(whole, list) else [whole]
        return
    for line in stream:
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError:
                skipped["invalid_json"] += 1
