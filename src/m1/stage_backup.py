"""Checkpoints of a stage under way, kept on S3 too: a pod that dies takes its disk with it.

Below `stages/<stage>-<hash12>/checkpoints/<attempt>/` lie `<name>/` (the files of a checkpoint) and
`records/` (what the stage has logged so far). The file that makes a checkpoint complete is written
last, and only older ones than a complete one are removed, so the newest that has it is whole.
Attempts of one stage compute the same, and any of them goes on from the newest of all.
"""

import contextlib
import shutil
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from m1.stage_place import attempt
from m1.storage import LocalStorage, Storage, atomic_write
from m1.storage.disk import visible_files

_RECORDS = "records"
_LOOKS = 3
"""How often a checkpoint is looked for that another attempt removes meanwhile."""


@dataclass(frozen=True)
class _Order:
    """A complete checkpoint that is to be sent."""

    folder: Path
    marker: str
    keep: int
    texts: Mapping[str, bytes]
    files: Mapping[str, Path]


class CheckpointBackup:
    """Sends checkpoints from a thread while training goes on, the newest one only.

    One that cannot be sent is told, and does not end the stage: the next one is tried again.
    """

    def __init__(self, storage: Storage, folder: Path) -> None:
        """Send nothing yet.

        Args:
            storage: Where the stage keeps its output.
            folder: The stage's folder on this machine.
        """
        self._storage, self._folder = storage, folder
        self._root = f"stages/{folder.name}/checkpoints"
        self._waiting: _Order | None = None
        self._running: _Order | None = None
        self._errors: list[str] = []
        self._sent: set[tuple[str, int, int]] = set()  # path, size, time of records
        self._is_closed = self._is_abandoned = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def send(
        self, folder: Path, *, marker: str, keep: int, records: Iterable[Path]
    ) -> tuple[frozenset[Path], list[str]]:
        """Begin to send a complete checkpoint; one that still waits is left out for it.

        Args:
            folder: The checkpoint, whose name sorts after those of earlier ones.
            marker: Name of its file that makes it complete.
            keep: How many stay on S3.
            records: Files that grow, and folders of files that do not change, in the stage's
                folder; they are sent as they are now.

        Returns:
            Checkpoints that must stay on this machine for now, and why earlier ones were not sent.
        """
        texts, files = self._recorded(records)
        with self._changed:
            self._waiting = _Order(folder, marker, keep, texts, files)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
            self._changed.notify_all()
            errors, self._errors = self._errors, []
            orders = (self._waiting, self._running)
            return frozenset(order.folder for order in orders if order is not None), errors

    def close(self) -> list[str]:
        """Wait until all is sent, or was tried; why it was not."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        return self._errors

    def clear(self) -> None:
        """Send nothing more, and remove what lies there: the stage is finished."""
        with self._changed:
            self._is_abandoned, self._waiting = True, None
        self.close()
        self._storage.remove_folder(self._root)

    def restore(self, checkpoints: Path, *, marker: str) -> None:
        """Bring the newest complete checkpoint and its records, unless this machine has it.

        Every rank may call it at once; the first does it, the others wait.
        """
        checkpoints.mkdir(parents=True, exist_ok=True)
        with FileLock(self._folder / ".restore.lock"):
            for _ in range(_LOOKS):
                newest = max(self._complete(marker), default=None)
                here = (p.parent.name for p in checkpoints.glob(f"[!.]*/{marker}"))
                if newest is None or newest[0] <= max(here, default=""):
                    return
                with contextlib.suppress(FileNotFoundError):  # removed by another attempt
                    self._bring(*newest, checkpoints, marker)
                    return

    def _bring(self, name: str, by: str, checkpoints: Path, marker: str) -> None:
        base, target = f"{self._root}/{by}", checkpoints / name
        shutil.rmtree(target, ignore_errors=True)  # without a marker
        self._bring_records(f"{base}/{_RECORDS}")
        self._storage.download_folder(f"{base}/{name}", target)
        if not (target / marker).exists():
            shutil.rmtree(target)
            raise FileNotFoundError(marker)

    def _bring_records(self, key: str) -> None:
        """Replace what this machine logged: it is of the steps before that checkpoint."""
        names = {k.removeprefix(f"{key}/").partition("/")[0] for k in self._storage.list(key)}
        for name in sorted(names):
            target = self._folder / name
            if self._storage.exists(f"{key}/{name}"):
                atomic_write(target, self._storage.read_bytes(f"{key}/{name}"))
            else:
                self._storage.download_folder(f"{key}/{name}", target)

    def _keys(self) -> list[list[str]]:
        """[attempt, name of a checkpoint, file, ...] of everything there."""
        found = self._storage.list(self._root)
        return [key.removeprefix(f"{self._root}/").split("/") for key in found]

    def _complete(self, marker: str) -> list[tuple[str, str]]:
        """(name, attempt) of all complete checkpoints."""
        return [(key[1], key[0]) for key in self._keys() if key[2:] == [marker]]

    def _recorded(self, paths: Iterable[Path]) -> tuple[dict[str, bytes], dict[str, Path]]:
        texts: dict[str, bytes] = {}
        files: dict[str, Path] = {}
        for path in paths:
            if path.is_file():
                texts[path.name] = path.read_bytes()
            elif path.is_dir():
                found = visible_files(path)
                files |= {p.relative_to(self._folder).as_posix(): p for p in found}
        return texts, files

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.wait_for(lambda: self._waiting is not None or self._is_closed)
                if self._waiting is None:
                    return
                order, self._waiting = self._waiting, None
                self._running = order
            try:
                self._put(order)
            except Exception as error:  # told with the next one, or at the end
                with self._changed:
                    self._errors.append(f"{order.folder.name} was not sent: {error}")

    def _put(self, order: _Order) -> None:
        base = f"{self._root}/{attempt(self._folder)}"
        for name, data in order.texts.items():
            self._storage.write_bytes(f"{base}/{_RECORDS}/{name}", data)
        new = {n: p for n, p in order.files.items() if _version(p) not in self._sent}
        for name, path in new.items():
            if not self._is_abandoned:
                version = _version(path)
                self._storage.upload_file(path, f"{base}/{_RECORDS}/{name}")
                self._sent.add(version)
        own = f"{base}/{order.folder.name}"
        parts = [p for p in visible_files(order.folder) if p.name != order.marker]
        paths = {f"{own}/{p.relative_to(order.folder).as_posix()}": p for p in parts}
        paths[f"{own}/{order.marker}"] = order.folder / order.marker
        for key, path in paths.items():
            if self._is_abandoned:
                return
            self._storage.upload_file(path, key)
        self._prune(order.marker, keep=order.keep)

    def _prune(self, marker: str, *, keep: int) -> None:
        """Remove all but the newest, those of earlier attempts too, and what those left torn."""
        complete = sorted(self._complete(marker))
        kept, newest = set(complete[-keep:]), complete[-1][0]
        users = {by for _, by in kept}
        for by, name in sorted({(key[0], key[1]) for key in self._keys()}):
            is_kept = by in users if name == _RECORDS else (name, by) in kept or name > newest
            if not is_kept:
                self._storage.remove_folder(f"{self._root}/{by}/{name}")


def _version(path: Path) -> tuple[str, int, int]:
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns


def backup_of(storage: Storage, folder: Path) -> CheckpointBackup | None:
    """Where a stage's checkpoints are kept beside its folder; None where that is the storage."""
    return None if isinstance(storage, LocalStorage) else CheckpointBackup(storage, folder)
