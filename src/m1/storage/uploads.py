"""Upload of one file: in parts with checksums, resumed where an earlier attempt stopped.

The id of a started multipart upload is kept in a hidden file beside the source, so only the
attempt's own successor goes on with it; parts are compared by their MD5 with what the server has.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m1.storage.connection import BadTransfer, Changed, Connection
from m1.storage.disk import atomic_write
from m1.storage.parts import (
    ObjectFacts,
    Part,
    PartDigest,
    checksums,
    composite,
    cut,
    digests_of,
    facts,
    metadata_headers,
    part_bytes_of,
    part_digest,
    read_part,
)
from m1.types import M1Error

if TYPE_CHECKING:
    from minio import Minio


@dataclass(frozen=True)
class _Source:
    """A local file, hashed."""

    path: Path
    num_bytes: int
    part_bytes: int
    digest: str
    digests: tuple[PartDigest, ...]

    @property
    def parts(self) -> list[Part]:
        return list(cut(self.num_bytes, self.part_bytes))


def upload_file(
    connection: Connection, name: str, path: Path, *, pool: Executor, may_exist: bool = True
) -> bool:
    """Make the object `name` hold the bytes of `path`.

    Args:
        connection: To the bucket.
        name: Of the object.
        path: Local file, which must not change meanwhile.
        pool: Runs the parts; the caller must not be one of its threads.
        may_exist: Whether to look first for an object that holds these bytes.

    Returns:
        Whether bytes were sent: False where the object held them.
    """
    num_bytes = path.stat().st_size
    part_bytes = part_bytes_of(num_bytes)
    if num_bytes <= part_bytes and not may_exist:
        put_bytes(connection, name, path.read_bytes())
        return True
    parts = cut(num_bytes, part_bytes)
    digests = list(pool.map(lambda part: part_digest(path, part), parts))
    digest = composite([part.sha256 for part in digests])
    source = _Source(path, num_bytes, part_bytes, digest, tuple(digests))
    if may_exist and _holds(connection, name, source):
        _record_of(path).unlink(missing_ok=True)
        return False
    if num_bytes <= part_bytes:
        put_bytes(connection, name, path.read_bytes())
    else:
        _put_large(connection, name, source, pool)
    return True


def put_bytes(
    connection: Connection,
    name: str,
    data: bytes,
    *,
    condition: Mapping[str, str] | None = None,
    patience_seconds: float | None = None,
) -> str:
    """Put a small object at once; its ETag.

    Args:
        connection: To the bucket.
        name: Of the object.
        data: Its content.
        condition: If-None-Match or If-Match.
        patience_seconds: How long failures are retried.

    Raises:
        Changed: The condition does not hold.
    """
    digest = digests_of(data)
    headers = {
        **metadata_headers([digest], part_bytes_of(len(data))),
        **(condition or {}),
        **checksums(digest),
        "Content-Type": "application/octet-stream",
    }

    def put(client: "Minio") -> str:
        # The public method takes no conditions.
        response = client._execute("PUT", connection.bucket, name, body=data, headers={**headers})
        return response.headers.get("etag", "").strip('"')

    return connection.call(put, patience_seconds=patience_seconds)


def head(connection: Connection, name: str) -> ObjectFacts:
    """Size and digests of an object; FileNotFoundError when there is none."""

    def ask(client: "Minio") -> ObjectFacts:
        return facts(client._execute("HEAD", connection.bucket, name).headers)

    return connection.call(ask)


def _holds(connection: Connection, name: str, source: _Source) -> bool:
    try:
        found = head(connection, name)
    except FileNotFoundError:
        return False
    return found.num_bytes == source.num_bytes and found.digest == source.digest


def _put_large(connection: Connection, name: str, source: _Source, pool: Executor) -> None:
    upload_id, sent = _resumed(connection, name, source)
    if upload_id is None:
        upload_id = _started(connection, name, source)

    def send(part: Part) -> str:
        return sent.get(part.number) or _send_part(
            connection, name, source.path, part, source.digests[part.number - 1], upload_id
        )

    etags = list(pool.map(send, source.parts))
    try:
        _complete(connection, name, upload_id, etags)
    except Changed:
        # The answer to an earlier request of ours was lost, or the upload was aborted.
        if not _holds(connection, name, source):
            _record_of(source.path).unlink(missing_ok=True)
            raise M1Error(
                f"the upload of {source.path} to {connection.bucket}/{name} was aborted at the "
                "server (a lifecycle rule, or an administrator); run the same command again"
            ) from None
    if not _holds(connection, name, source):
        raise M1Error(
            f"{connection.bucket}/{name} is not what was uploaded: another process writes it too, "
            "or the server drops metadata; run the same command again"
        )
    _record_of(source.path).unlink(missing_ok=True)


def _started(connection: Connection, name: str, source: _Source) -> str:
    headers = metadata_headers(source.digests, source.part_bytes)
    upload_id = connection.call(
        lambda client: client._create_multipart_upload(connection.bucket, name, {**headers})
    )
    record = {"bucket": connection.bucket, "object": name, "upload_id": upload_id}
    # In a folder that cannot be written the upload works, and resuming does not.
    with contextlib.suppress(M1Error):
        atomic_write(
            _record_of(source.path), json.dumps({**record, "digest": source.digest}).encode()
        )
    return upload_id


def _resumed(
    connection: Connection, name: str, source: _Source
) -> tuple[str | None, dict[int, str]]:
    """The upload of an earlier attempt, and ETags of its parts that hold the right bytes."""
    try:
        record = json.loads(_record_of(source.path).read_bytes())
    except (OSError, ValueError):
        return None, {}
    wanted = {"bucket": connection.bucket, "object": name, "digest": source.digest}
    if {key: record.get(key) for key in wanted} != wanted:
        return None, {}
    upload_id = str(record.get("upload_id"))
    try:
        there = _listed_parts(connection, name, upload_id)
    except (Changed, FileNotFoundError):
        return None, {}
    sent = {}
    for part in source.parts:
        etag = there.get(part.number)
        if etag and etag == hashlib.md5(read_part(source.path, part)).hexdigest():
            sent[part.number] = etag
    return upload_id, sent


def _listed_parts(connection: Connection, name: str, upload_id: str) -> dict[int, str]:
    found: dict[int, str] = {}
    marker: str | None = None

    def ask(client: "Minio") -> Any:
        return client._list_parts(connection.bucket, name, upload_id, part_number_marker=marker)

    while True:
        page = connection.call(ask)
        found |= {int(part.part_number): part.etag.strip('"') for part in page.parts}
        if not page.is_truncated or not page.parts:
            return found
        marker = str(page.parts[-1].part_number)


def _send_part(
    connection: Connection, name: str, path: Path, part: Part, digest: PartDigest, upload_id: str
) -> str:
    data = read_part(path, part)
    headers = checksums(digest)

    def send(client: "Minio") -> str:
        etag = client._upload_part(
            connection.bucket, name, data, {**headers}, upload_id, part.number
        )
        if not etag:
            raise BadTransfer(f"part {part.number} of {name} was answered without an ETag")
        return etag

    return connection.call(send)


def _complete(connection: Connection, name: str, upload_id: str, etags: list[str]) -> None:
    from minio.datatypes import Part as MinioPart

    parts = [MinioPart(number, etag) for number, etag in enumerate(etags, start=1)]
    connection.call(
        lambda client: client._complete_multipart_upload(connection.bucket, name, upload_id, parts)
    )


def _record_of(path: Path) -> Path:
    return path.parent / f".{path.name}.upload"
