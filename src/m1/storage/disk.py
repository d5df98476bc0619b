"""Files on a local disk: atomic writes, whole folders, digests, and what a full disk is called.

Names that start with "." are work in progress: neither copied, nor listed, nor part of a digest.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from m1.types import M1Error

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PROBE_BYTES = 1 << 20
"""A disk that does not take this much is called full."""
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def folder_digest(path: Path) -> str:
    """Hex sha256 over the sorted (relative POSIX path, size, sha256 of content) of all files."""
    total = hashlib.sha256()
    for file in visible_files(path):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        name = file.relative_to(path).as_posix()
        total.update(f"{name}\0{file.stat().st_size}\0{content}\n".encode())
    return total.hexdigest()


def atomic_write(path: Path, data: bytes) -> None:
    """Create or replace `path`; a reader, or a crash, finds the old or the new content in whole."""
    temporary = path.parent / hidden_name(path.name)
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Translate a full, forbidden or misplaced location, met while writing at `path`.

    Libraries report a full disk in words of their own (torch's checkpoint writer, sqlite): any
    exception that rises while the disk takes no more data is put down to that.
    """
    elsewhere = "set storage.root (with S3: storage.scratch)"
    try:
        yield
    except M1Error:
        raise
    except Exception as error:
        is_full = isinstance(error, OSError) and error.errno in _FULL
        if is_full or _refuses_data(path):
            raise M1Error(
                f"{path} cannot take more data (disk full; {_free_bytes(path)} bytes free); "
                f"free space or raise the quota there, or {elsewhere} to a larger disk"
            ) from error
        if not isinstance(error, OSError):
            raise
        where = Path(error.filename or path)
        if error.errno in _FORBIDDEN:
            raise M1Error(
                f"{where} cannot be written ({error.strerror}); make it writable for this user, "
                f"or {elsewhere} to a folder that is"
            ) from error
        if error.errno == errno.ENOTDIR or (error.errno == errno.EEXIST and where.is_file()):
            raise M1Error(
                f"{where} needs to be a folder, but a file is in its place; move the file, "
                f"or {elsewhere} to another folder"
            ) from error
        raise


def _refuses_data(path: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=_existing(path)) as probe:
            os.posix_fallocate(probe.fileno(), 0, _PROBE_BYTES)
    except OSError as error:
        return error.errno in _FULL
    return False


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(_existing(path)).free


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def checked(key: str) -> str:
    """`key` in its usual form; ValueError when it leads out of the storage."""
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"key {key!r} is not a relative path inside the storage")
    return "" if key in {"", "."} else path.as_posix()


def is_hidden(relative: PurePosixPath | Path) -> bool:
    """Whether a path is work in progress; PyTorch's `.metadata` of a checkpoint is not."""
    return any(part.startswith(".") and part != ".metadata" for part in relative.parts)


def hidden_name(name: str) -> str:
    """A new name for work in progress on `name`."""
    return f".{name}.{uuid.uuid4().hex}"


def visible_files(folder: Path) -> list[Path]:
    """Visible files below `folder`, sorted by relative POSIX path."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    found = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if not is_hidden(path.relative_to(folder)) and path.is_file()
    }
    return [found[name] for name in sorted(found)]


def copy_folder(source: Path, target: Path) -> None:
    """Make `target` hold exactly the visible files of `source`; it appears whole."""
    files = visible_files(source)
    if target.exists() and source.samefile(target):
        return
    with disk_errors(target), staged_folder(target) as staged:
        for path in files:
            copy = staged / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` that takes its place when the block succeeds."""
    staged = target.parent / hidden_name(target.name)
    replaced = target.parent / hidden_name(target.name)
    staged.mkdir(parents=True)
    try:
        yield staged
        if target.exists():
            os.replace(target, replaced)
        os.replace(staged, target)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
