"""Raw text documents, in a fixed order, from the places a recipe can name."""

import fnmatch
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from m1.config.schema import SourceConfig
from m1.storage import open_storage
from m1.types import M1Error

_NOT_LIBRARY = {
    "__pycache__",
    "data",
    "dist-packages",
    "idle_test",
    "idlelib",
    "site-packages",
    "test",
    "tests",
}


@dataclass(frozen=True)
class Document:
    """One text with the name of its source; `identifier` is unique within the source."""

    source: str
    identifier: str
    text: str


def read_source(config: SourceConfig, *, skipped: Counter[str]) -> Iterator[Document]:
    """Documents of one source in sorted order, at most `max_documents`.

    What cannot be read as text is left out and counted in `skipped`: `not_utf8`, `invalid_json` or
    `missing_text_field`.
    """
    number = 0
    for name, stream in _files(config):
        with stream:
            if config.kind == "jsonl" or name.endswith(".jsonl"):
                texts = _lines(name, stream, config.text_field, skipped)
            else:
                texts = _whole(name, stream, skipped)
            for identifier, text in texts:
                if number == config.max_documents:
                    return
                number += 1
                yield Document(config.name, identifier, text)


def _files(config: SourceConfig) -> Iterator[tuple[str, BinaryIO]]:
    if config.kind == "python_stdlib":
        return _below(Path(sysconfig.get_path("stdlib")), ("*.py",), excluded=_NOT_LIBRARY)
    assert config.uri is not None  # The schema refuses the other kinds without one.
    if config.kind == "s3":
        return _objects(config.uri, config.include)
    path = Path(config.uri)
    if config.kind == "folder":
        if not path.is_dir():
            raise M1Error(f"source {config.name!r}: {path} is not a folder; correct its uri")
        return _below(path, config.include)
    if not path.is_file():
        raise M1Error(f"source {config.name!r}: {path} is not a file; correct its uri")
    return iter([(path.name, path.open("rb"))])


def _below(
    root: Path, include: tuple[str, ...], *, excluded: set[str] | None = None
) -> Iterator[tuple[str, BinaryIO]]:
    paths = []
    for folder, folders, names in os.walk(root):
        # Pruning here, not afterwards, keeps the walk out of large site-packages.
        folders[:] = [
            name for name in folders if name not in (excluded or ()) and not name.startswith(".")
        ]
        paths += [Path(folder, name) for name in names if _is_included(name, include)]
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        yield path.relative_to(root).as_posix(), path.open("rb")


def _objects(uri: str, include: tuple[str, ...]) -> Iterator[tuple[str, BinaryIO]]:
    storage = open_storage(uri)
    for key in storage.list():
        if _is_included(key.rpartition("/")[2], include):
            yield key, storage.open_read(key)


def _is_included(name: str, include: tuple[str, ...]) -> bool:
    return not name.startswith(".") and any(fnmatch.fnmatchcase(name, item) for item in include)


def _whole(name: str, stream: BinaryIO, skipped: Counter[str]) -> Iterator[tuple[str, str]]:
    try:
        yield name, stream.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        skipped["not_utf8"] += 1


def _lines(
    name: str, stream: BinaryIO, text_field: str, skipped: Counter[str]
) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except UnicodeDecodeError:
            skipped["not_utf8"] += 1
            continue
        except ValueError:
            skipped["invalid_json"] += 1
            continue
        text = row.get(text_field) if isinstance(row, dict) else None
        if isinstance(text, str):
            yield f"{name}:{number}", text
        else:
            skipped["missing_text_field"] += 1
