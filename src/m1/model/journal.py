"""Files written one after the other, so that a killed writer goes on where it was.

A file is written under a hidden name and gets its own when it is whole. Before that, its sha256
goes into the journal, so every file that bears its name can be verified.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from m1.storage import atomic_write, disk_errors
from m1.types import M1Error

JOURNAL = "conversion.json"
Bytes = bytes | memoryview


class Journal:
    """The finished files of one conversion, in `conversion.json` beside them."""

    def __init__(self, folder: Path, plan: str, *, written: str) -> None:
        """Continue the journal of an equal plan, or begin one.

        Args:
            folder: Where the files lie.
            plan: Digest of all that decides what is written.
            written: Pattern of the names of such files; without a journal there may be none.

        Raises:
            M1Error: The folder holds files of another plan, or of no conversion.
        """
        self._folder, self._plan = folder, plan
        self._files: dict[str, dict[str, Any]] = {}
        path = folder / JOURNAL
        if path.exists():
            content = _read(path)
            if content.get("plan") != plan:
                raise M1Error(
                    f"{folder} holds a conversion of another source, layout or shard size; delete "
                    "it, or name another target"
                )
            self._files = content["files"]
        elif any(folder.glob(written)):
            raise M1Error(
                f"{folder} holds weights that no conversion wrote, and they are not overwritten; "
                "name another target"
            )

    def add(self, name: str, digest: str, note: Any = None) -> None:
        """Note a file that is about to get its name, and what its writer wants to remember."""
        self._files[name] = {"sha256": digest, "note": note}
        content = {"plan": self._plan, "files": self._files}
        atomic_write(self._folder / JOURNAL, json.dumps(content, indent=1).encode())

    def has(self, name: str) -> bool:
        """Whether the file is there with the content that was written."""
        path = self._folder / name
        if name not in self._files or not path.exists():
            return False
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return bool(digest == self._files[name]["sha256"])

    def note(self, name: str) -> Any:
        """What the writer of a finished file wanted to remember."""
        return self._files[name]["note"]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    return content if isinstance(content, dict) else {}


class Sink(io.RawIOBase):
    """A file under way that knows its digest."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, data: Any) -> int:
        """Append bytes, or what is seen as them."""
        self.digest.update(data)
        written = self._file.write(data)
        self.size += written
        return written


def write_file(path: Path, fill: Callable[[Sink], Any], journal: Journal | None = None) -> None:
    """Write a file that appears only when whole.

    Args:
        path: Its name.
        fill: Writes the content; what it returns is noted in the journal.
        journal: Where to note the file.

    Raises:
        M1Error: The disk is full or not writable.
    """
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path.parent), partial.open("wb") as file:
        sink = Sink(file)
        note = fill(sink)
        file.flush()
        os.fsync(file.fileno())
    if journal is not None:
        journal.add(path.name, sink.digest.hexdigest(), note)
    os.replace(partial, path)
