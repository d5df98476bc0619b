"""Artifacts in a folder or below `s3://bucket/prefix`, behind one interface; digests, pointers.

Names that start with "." are work in progress: neither copied, nor listed, nor part of a digest.
A pointer is written after everything it points at, so what a pointer names is whole.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol, TypeVar

from m1.types import M1Error, Pointer

if TYPE_CHECKING:
    from minio import Minio

T = TypeVar("T")

_PARALLEL_TRANSFERS = 8
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PROBE_BYTES = 1 << 20
"""A disk that does not take this much is called full."""
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_TRANSIENT_S3_CODES = {"InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout"}


class Storage(Protocol):
    """Where stages keep what they make.

    A key is a relative POSIX path; the key of a folder names every file below it.
    """

    def ensure_usable(self) -> None:
        """Raise `M1Error` with the remedy unless this storage can be written now."""

    def uri(self, key: str) -> str:
        """Full address of `key`: an absolute path or an s3 uri."""

    def exists(self, key: str) -> bool:
        """Whether there is a file `key`; a folder does not count."""

    def read_bytes(self, key: str) -> bytes:
        """Content of the file `key`; FileNotFoundError when there is none."""

    def write_bytes(self, key: str, data: bytes) -> None:
        """Create or replace the file `key`; never seen in part."""

    def upload_folder(self, folder: Path, key: str) -> None:
        """Make `key` hold exactly the files of `folder`."""

    def download_folder(self, key: str, folder: Path) -> None:
        """Make `folder` hold exactly the files below `key`; it appears only when complete."""

    def list(self, prefix: str = "") -> tuple[str, ...]:
        """Sorted keys of all files below the folder `prefix`."""


def open_storage(root: str) -> Storage:
    """Storage for a folder, a `file://` uri or `s3://bucket/prefix`; no disk or network access."""
    scheme, separator, rest = root.partition("://")
    if not separator:
        return LocalStorage(Path(root))
    if scheme == "file":
        return LocalStorage(Path(rest))
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise M1Error(
            f"storage root {root!r} is neither a folder nor s3://bucket/prefix; give one of the two"
        )
    return S3Storage(bucket, prefix.strip("/"))


class LocalStorage:
    """Storage in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))

    def ensure_usable(self) -> None:
        """Create the folder and write a probe file in it."""
        probe = self.root / _hidden_name("probe")
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

    def upload_folder(self, folder: Path, key: str) -> None:
        """Copy `folder` to `key`; nothing to do when it already lies there."""
        _copy_folder(folder, self._path(key))

    def download_folder(self, key: str, folder: Path) -> None:
        """Copy `key` to `folder`; nothing to do when it already lies there."""
        _copy_folder(self._path(key), folder)

    def list(self, prefix: str = "") -> tuple[str, ...]:
        """Sorted keys below `prefix`; empty when the folder does not exist."""
        folder = self._path(prefix)
        if not folder.is_dir():
            return ()
        return tuple(sorted(path.relative_to(self.root).as_posix() for path in _files(folder)))

    def _path(self, key: str) -> Path:
        return self.root / _checked(key)


class S3Storage:
    """Storage below a prefix of a bucket.

    Endpoint and keys come from S3_ENDPOINT or AWS_ENDPOINT_URL (absent: AWS), AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and AWS_REGION. Transient failures of the network and
    the server are retried; everything else rises at once.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = prefix
        given = os.environ.get("S3_ENDPOINT") or os.environ.get("AWS_ENDPOINT_URL")
        self.endpoint = given or "https://s3.amazonaws.com"

    def ensure_usable(self) -> None:
        """Check the bucket and write a probe object into it."""
        if not self._call(lambda client: client.bucket_exists(self.bucket)):
            raise self._missing_bucket()
        probe = _hidden_name("probe")
        self.write_bytes(probe, b"")
        self._remove(probe)

    def uri(self, key: str) -> str:
        """S3 uri of `key`."""
        return f"s3://{self.bucket}/{self._object(key)}"

    def exists(self, key: str) -> bool:
        """Whether there is an object `key`."""
        try:
            self._call(lambda client: client.stat_object(self.bucket, self._object(key)))
        except FileNotFoundError:
            return False
        return True

    def read_bytes(self, key: str) -> bytes:
        """Content of the object `key`."""

        def read(client: "Minio") -> bytes:
            response = client.get_object(self.bucket, self._object(key))
            try:
                return response.read()
            finally:
                response.close()
                response.release_conn()

        return self._call(read)

    def write_bytes(self, key: str, data: bytes) -> None:
        """Put the object `key`; a put is atomic in S3."""
        name = self._object(key)
        self._call(
            lambda client: client.put_object(self.bucket, name, BytesIO(data), length=len(data))
        )

    def upload_folder(self, folder: Path, key: str) -> None:
        """Put every file, then remove objects below `key` that `folder` does not have."""
        sources = {f"{key}/{path.relative_to(folder).as_posix()}": path for path in _files(folder)}

        def put(target: str) -> None:
            source, name = str(sources[target]), self._object(target)
            self._call(lambda client: client.fput_object(self.bucket, name, source))

        with ThreadPoolExecutor(_PARALLEL_TRANSFERS) as pool:
            for _ in pool.map(put, sources):
                pass
        for stale in set(self.list(key)) - sources.keys():
            self._remove(stale)

    def download_folder(self, key: str, folder: Path) -> None:
        """Get every object below `key` into a hidden folder, then rename it to `folder`."""
        keys = self.list(key)
        if not keys:
            raise FileNotFoundError(f"nothing lies below {self.uri(key)}")

        with disk_errors(folder), _staged_folder(folder) as staged:

            def get(source: str) -> None:
                target = str(staged / PurePosixPath(source).relative_to(key))
                name = self._object(source)
                self._call(lambda client: client.fget_object(self.bucket, name, target))

            with ThreadPoolExecutor(_PARALLEL_TRANSFERS) as pool:
                for _ in pool.map(get, keys):
                    pass

    def list(self, prefix: str = "") -> tuple[str, ...]:
        """Sorted keys below `prefix`."""
        start = f"{self._object(prefix)}/" if self._object(prefix) else ""
        below = f"{self.prefix}/" if self.prefix else ""
        names = self._call(
            lambda client: [
                item.object_name or ""
                for item in client.list_objects(self.bucket, start, recursive=True)
                if not item.is_dir
            ]
        )
        keys = (name.removeprefix(below) for name in names)
        return tuple(sorted(key for key in keys if not _is_hidden(PurePosixPath(key))))

    def _remove(self, key: str) -> None:
        self._call(lambda client: client.remove_object(self.bucket, self._object(key)))

    def _object(self, key: str) -> str:
        return "/".join(part for part in (self.prefix, _checked(key)) if part)

    @cached_property
    def _client(self) -> "Minio":
        import certifi
        import urllib3
        from minio import Minio

        key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
        if not key or not secret:
            raise M1Error(
                f"s3://{self.bucket} needs credentials, but AWS_ACCESS_KEY_ID or "
                f"AWS_SECRET_ACCESS_KEY is not set; export both for {self.endpoint}"
            )
        scheme, separator, host = self.endpoint.partition("://")
        authorities = os.environ.get("SSL_CERT_FILE") or os.environ.get("AWS_CA_BUNDLE")
        http = urllib3.PoolManager(
            maxsize=_PARALLEL_TRANSFERS,
            timeout=urllib3.Timeout(connect=5, read=300),
            retries=False,
            ca_certs=authorities or certifi.where(),
        )
        try:
            return Minio(
                (host if separator else scheme).rstrip("/"),
                access_key=key,
                secret_key=secret,
                session_token=os.environ.get("AWS_SESSION_TOKEN"),
                secure=not separator or scheme == "https",
                # A given region saves a request that many compatible servers do not answer.
                region=os.environ.get("AWS_REGION", "us-east-1"),
                http_client=http,
            )
        except ValueError as error:
            raise M1Error(
                f"S3 endpoint {self.endpoint!r} is not usable ({error}); "
                "set S3_ENDPOINT to scheme://host:port without a path"
            ) from error

    def _call(self, operation: "Callable[[Minio], T]") -> T:
        """Run one operation with retries and translate what is left into errors with a remedy."""
        import tenacity
        from minio.error import S3Error
        from urllib3.exceptions import HTTPError

        client = self._client
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_transient),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
            stop=tenacity.stop_after_attempt(4),
            reraise=True,
        )
        try:
            return retrying(operation, client)
        except HTTPError as error:
            raise M1Error(
                f"S3 endpoint {self.endpoint} cannot be reached ({error}); "
                "start the server or correct S3_ENDPOINT"
            ) from error
        except S3Error as error:
            raise self._explained(error.code, str(error)) from error

    def _explained(self, code: str | None, message: str) -> Exception:
        if code == "NoSuchKey":
            return FileNotFoundError(f"{message} at {self.endpoint}")
        if code == "NoSuchBucket":
            return self._missing_bucket()
        if code in {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}:
            return M1Error(
                f"{self.endpoint} refuses s3://{self.bucket} ({code}); correct AWS_ACCESS_KEY_ID "
                "and AWS_SECRET_ACCESS_KEY, or let that user read and write the bucket"
            )
        return M1Error(f"{self.endpoint} failed on s3://{self.bucket}: {message}")

    def _missing_bucket(self) -> M1Error:
        return M1Error(
            f"bucket {self.bucket!r} does not exist at {self.endpoint}; create it: "
            f'mc alias set m1 {self.endpoint} "$AWS_ACCESS_KEY_ID" "$AWS_SECRET_ACCESS_KEY" && '
            f"mc mb m1/{self.bucket}"
        )


def _is_transient(error: BaseException) -> bool:
    from minio.error import S3Error, ServerError
    from urllib3.exceptions import HTTPError, SSLError

    if isinstance(error, S3Error):
        return error.code in _TRANSIENT_S3_CODES
    return isinstance(error, HTTPError | ServerError) and not isinstance(error, SSLError)


def folder_digest(path: Path) -> str:
    """Hex sha256 over the sorted (relative POSIX path, size, sha256 of content) of all files."""
    total = hashlib.sha256()
    for file in _files(path):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        name = file.relative_to(path).as_posix()
        total.update(f"{name}\0{file.stat().st_size}\0{content}\n".encode())
    return total.hexdigest()


def write_pointer(storage: Storage, key: str, pointer: Pointer) -> None:
    """Write `pointer` as JSON; call it after everything it points at is in place."""
    storage.write_bytes(key, json.dumps(asdict(pointer), indent=2, sort_keys=True).encode())


def read_pointer(storage: Storage, key: str) -> Pointer | None:
    """The pointer at `key`; None when it is absent, torn or not a pointer."""
    try:
        fields = json.loads(storage.read_bytes(key))
        pointer = Pointer(**fields)
    except (FileNotFoundError, ValueError, TypeError):
        return None
    texts = (pointer.stage, pointer.stage_hash, pointer.uri, pointer.digest)
    is_whole = (
        all(isinstance(text, str) for text in texts)
        and isinstance(pointer.step, int | None)
        and isinstance(pointer.metadata, dict)
    )
    return pointer if is_whole else None


def atomic_write(path: Path, data: bytes) -> None:
    """Create or replace `path`; a reader, or a crash, finds the old or the new content in whole."""
    temporary = path.parent / _hidden_name(path.name)
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


def _checked(key: str) -> str:
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"key {key!r} is not a relative path inside the storage")
    return "" if key in {"", "."} else path.as_posix()


def _is_hidden(relative: PurePosixPath | Path) -> bool:
    return any(part.startswith(".") and part != ".metadata" for part in relative.parts)


def _hidden_name(name: str) -> str:
    return f".{name}.{uuid.uuid4().hex}"


def _files(folder: Path) -> list[Path]:
    """Visible files below `folder`, sorted by relative POSIX path."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    found = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if not _is_hidden(path.relative_to(folder)) and path.is_file()
    }
    return [found[name] for name in sorted(found)]


def _copy_folder(source: Path, target: Path) -> None:
    files = _files(source)
    if target.exists() and source.samefile(target):
        return
    with disk_errors(target), _staged_folder(target) as staged:
        for path in files:
            copy = staged / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)


@contextlib.contextmanager
def _staged_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` that takes its place when the block succeeds."""
    staged = target.parent / _hidden_name(target.name)
    replaced = target.parent / _hidden_name(target.name)
    staged.mkdir(parents=True)
    try:
        yield staged
        if target.exists():
            os.replace(target, replaced)
        os.replace(staged, target)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
