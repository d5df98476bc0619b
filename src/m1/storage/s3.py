"""Storage below a prefix of a bucket, through the minio client."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

from filelock import FileLock, Timeout

from m1.storage.connection import Changed, Connection
from m1.storage.disk import checked, disk_errors, hidden_name, is_hidden, visible_files
from m1.storage.downloads import download_file, open_object, read_object
from m1.storage.leases import hold_lease
from m1.storage.uploads import head, put_bytes, upload_file

if TYPE_CHECKING:
    from minio import Minio

_FILES_AT_ONCE = 4
_PARTS_AT_ONCE = 4
"""Parts of all files together; each holds one part's bytes."""
_PROBE_PATIENCE_SECONDS = 5.0


class S3Storage:
    """Storage below a prefix of a bucket; `m1.storage.connection` says where and with what keys.

    Failures of the network and the server are retried with backoff and jitter; everything else
    rises at once.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.connection = Connection(bucket)

    def ensure_usable(self) -> None:
        """Check the bucket and write a probe object into it."""
        if not self.connection.call(
            lambda client: client.bucket_exists(self.bucket),
            patience_seconds=_PROBE_PATIENCE_SECONDS,
        ):
            raise self.connection.missing_bucket()
        probe = self._object(hidden_name("probe"))
        put_bytes(self.connection, probe, b"", patience_seconds=_PROBE_PATIENCE_SECONDS)
        self._remove(probe)

    def uri(self, key: str) -> str:
        """S3 uri of `key`."""
        return f"s3://{self.bucket}/{self._object(key)}"

    def exists(self, key: str) -> bool:
        """Whether there is an object `key`."""
        try:
            head(self.connection, self._object(key))
        except FileNotFoundError:
            return False
        return True

    def read_bytes(self, key: str) -> bytes:
        """Content of the object `key`, checked against its digest."""
        return read_object(self.connection, self._object(key))

    def open_read(self, key: str) -> BinaryIO:
        """The object `key` as a stream of ranges."""
        return open_object(self.connection, self._object(key))

    def write_bytes(self, key: str, data: bytes) -> None:
        """Put the object `key`; a put is atomic in S3."""
        put_bytes(self.connection, self._object(key), data)

    def create_bytes(self, key: str, data: bytes) -> bool:
        """Put with If-None-Match, which S3, MinIO and SeaweedFS answer atomically."""
        name = self._object(key)
        try:
            put_bytes(self.connection, name, data, condition={"If-None-Match": "*"})
        except Changed:
            # After a lost answer it may be our own that is there.
            return read_object(self.connection, name) == data
        return True

    def upload_file(self, path: Path, key: str) -> None:
        """Put one file; nothing is sent where the object holds its bytes."""
        with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
            upload_file(self.connection, self._object(key), path, pool=pool)

    def upload_folder(self, folder: Path, key: str) -> None:
        """Put every file that is not there, then remove objects that `folder` does not have."""
        sources = {
            f"{key}/{path.relative_to(folder).as_posix()}": path for path in visible_files(folder)
        }
        there = set(self.list(key))
        with (
            ThreadPoolExecutor(_FILES_AT_ONCE) as files,
            ThreadPoolExecutor(_PARTS_AT_ONCE) as parts,
        ):

            def put(target: str) -> None:
                upload_file(
                    self.connection,
                    self._object(target),
                    sources[target],
                    pool=parts,
                    may_exist=target in there,
                )

            for _ in files.map(put, sources):
                pass
        for stale in there - sources.keys():
            self._remove(self._object(stale))

    def download_folder(self, key: str, folder: Path) -> None:
        """Get every object below `key` into a hidden folder, then rename it to `folder`.

        The hidden folder stays after a failure, and the next call goes on in it.
        """
        keys = self.list(key)
        if not keys:
            raise FileNotFoundError(f"nothing lies below {self.uri(key)}")
        with (
            disk_errors(folder),
            _staging(folder) as staged,
            ThreadPoolExecutor(_FILES_AT_ONCE) as files,
            ThreadPoolExecutor(_PARTS_AT_ONCE) as parts,
        ):

            def get(source: str) -> Path:
                target = staged / PurePosixPath(source).relative_to(key)
                download_file(self.connection, self._object(source), target, pool=parts)
                return target

            wanted = set(files.map(get, keys))
            for path in staged.rglob("*"):  # of an earlier attempt at another state
                if path.is_file() and path not in wanted:
                    path.unlink()

    def remove_folder(self, key: str) -> None:
        """Remove every object below `key`."""
        for name in self._names(key):
            self._remove(name)

    @contextlib.contextmanager
    def hold(self, key: str, *, owner: str, timeout_seconds: float) -> Iterator[None]:
        """A lease: an object that its holder renews."""
        with hold_lease(
            self.connection, self._object(key), owner=owner, timeout_seconds=timeout_seconds
        ):
            yield

    def list(self, prefix: str = "") -> tuple[str, ...]:
        """Sorted keys below `prefix`."""
        below = f"{self.prefix}/" if self.prefix else ""
        keys = (name.removeprefix(below) for name in self._names(prefix))
        return tuple(sorted(key for key in keys if not is_hidden(PurePosixPath(key))))

    def _names(self, prefix: str) -> tuple[str, ...]:
        start = f"{self._object(prefix)}/" if self._object(prefix) else ""

        def ask(client: "Minio") -> tuple[str, ...]:
            found = client.list_objects(self.bucket, start, recursive=True)
            return tuple(item.object_name or "" for item in found if not item.is_dir)

        return self.connection.call(ask)

    def _remove(self, name: str) -> None:
        self.connection.call(lambda client: client.remove_object(self.bucket, name))

    def _object(self, key: str) -> str:
        return "/".join(part for part in (self.prefix, checked(key)) if part)


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """The hidden folder in which `folder` is put together; it takes its place on success."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    staged = folder.parent / f".{folder.name}.partial"
    is_shared = True
    try:
        lock.acquire(timeout=0)
    except Timeout:  # another process fills the usual one
        staged, is_shared = folder.parent / hidden_name(folder.name), False
    try:
        staged.mkdir(exist_ok=True)
        yield staged
        replaced = folder.parent / hidden_name(folder.name)
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(staged, folder)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        if not is_shared:
            shutil.rmtree(staged, ignore_errors=True)
        elif not staged.exists():
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
