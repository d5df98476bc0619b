"""Storage in a folder."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from m1.storage.disk import (
    atomic_write,
    checked,
    copy_folder,
    disk_errors,
    hidden_name,
    visible_files,
)


class LocalStorage:
    """Storage in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))

    def ensure_usable(self) -> None:
        """Create the folder and write a probe file in it."""
        probe = self.root / hidden_name("probe")
        with disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()

    def uri(self, key: str) -> str:
        """Absolute path of `key`."""
        return str(self._path(key))

    def exists(self, key: str) -> bool:
        """Whether there is a file `key`."""
        return self._path(key).is_file()

    def read_bytes(self, key: str) -> bytes:
        """Content of the file `key`."""
        return self._path(key).read_bytes()

    def write_bytes(self, key: str, data: bytes) -> None:
        """Replace the file `key` atomically."""
        atomic_write(self._path(key), data)

    def open_read(self, key: str) -> BinaryIO:
        """The file `key`, opened."""
        return self._path(key).open("rb")

    def create_bytes(self, key: str, data: bytes) -> bool:
        """Link a complete file to its name, which fails where there is one."""
        path = self._path(key)
        temporary = path.parent / hidden_name(path.name)
        atomic_write(temporary, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def upload_file(self, path: Path, key: str) -> None:
        """Copy a file; nothing to do when it already lies there."""
        target = self._path(key)
        if target.exists() and path.samefile(target):
            return
        staged = target.parent / hidden_name(target.name)
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copy(path, staged)
                os.replace(staged, target)
            finally:
                staged.unlink(missing_ok=True)

    def upload_folder(self, folder: Path, key: str) -> None:
        """Copy `folder` to `key`; nothing to do when it already lies there."""
        copy_folder(folder, self._path(key))

    def download_folder(self, key: str, folder: Path) -> None:
        """Copy `key` to `folder`; nothing to do when it already lies there."""
        copy_folder(self._path(key), folder)

    def remove_folder(self, key: str) -> None:
        """Remove the folder."""
        shutil.rmtree(self._path(key), ignore_errors=True)

    @contextlib.contextmanager
    def hold(self, key: str, *, owner: str, timeout_seconds: float) -> Iterator[None]:
        """A file lock, which ends with its process."""
        path = self._path(key)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=timeout_seconds)
        except Timeout:
            raise TimeoutError(f"another process holds {path}") from None
        with lock:
            yield

    def list(self, prefix: str = "") -> tuple[str, ...]:
        """Sorted keys below `prefix`; empty when the folder does not exist."""
        folder = self._path(prefix)
        if not folder.is_dir():
            return ()
        return tuple(
            sorted(path.relative_to(self.root).as_posix() for path in visible_files(folder))
        )

    def _path(self, key: str) -> Path:
        return self.root / checked(key)
