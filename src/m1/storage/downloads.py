"""Download of one object: in ranges, checked against its digest, resumed where it stopped.

A large file is written in place under a hidden name; a journal beside it lists the ranges that
have arrived with the CRC-32 of what was received.
"""

import hashlib
import io
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m1.storage.connection import BadTransfer, Changed, Connection, stall_seconds
from m1.storage.parts import ObjectFacts, Part, composite, cut, facts, part_digest
from m1.storage.uploads import head
from m1.types import M1Error

if TYPE_CHECKING:
    from minio import Minio

_CHUNK_BYTES = 1 << 20
_SLOWEST_BYTES_PER_SECOND = 32 << 10
_ATTEMPTS = 4
"""How often an object is fetched anew whose bytes do not match its digest, or that changes."""


def read_object(connection: Connection, name: str) -> bytes:
    """Content of a small object, checked; FileNotFoundError when there is none."""

    def read(client: "Minio") -> bytes:
        response = client.get_object(connection.bucket, name)
        try:
            found = facts(response.headers)
            data = b"".join(_chunks(response, found.num_bytes))
        finally:
            response.close()
            response.release_conn()
        _require_whole(name, data, found)
        return data

    return connection.call(read)


def download_file(connection: Connection, name: str, path: Path, *, pool: Executor) -> None:
    """Make `path` hold the content of the object `name`; it appears only when it is complete.

    Args:
        connection: To the bucket.
        name: Of the object.
        path: Local file. One that holds the right bytes is kept.
        pool: Runs the ranges; the caller must not be one of its threads.

    Raises:
        FileNotFoundError: There is no such object.
        M1Error: The bytes at the server do not match the digest kept with them.
    """
    for _ in range(_ATTEMPTS):
        wanted = head(connection, name)
        if path.exists() and _matches(path, wanted, pool):
            return
        try:
            _fetch(connection, name, path, wanted, pool)
        except Changed:  # replaced meanwhile
            continue
        partial = partial_of(path)
        if wanted.crc is None or _received(partial, wanted) == wanted.crc:
            os.replace(partial, path)
            _journal_of(path).unlink(missing_ok=True)
            return
        partial.unlink()
        _journal_of(path).unlink(missing_ok=True)
    raise M1Error(
        f"s3://{connection.bucket}/{name} differs from the digest that was kept with it, or "
        f"changes all the time; after {_ATTEMPTS} attempts it is given up. Delete it, and run the "
        "stage that makes it"
    )


def open_object(connection: Connection, name: str) -> io.BufferedReader:
    """An object as a seekable stream that holds 4 MiB at a time."""
    return io.BufferedReader(_Ranges(connection, name), buffer_size=4 << 20)


class _Ranges(io.RawIOBase):
    """Reads ranges of one version of an object, each retried by itself."""

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection, self._name = connection, name
        self._facts = head(connection, name)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._facts.num_bytes}
        self._position = max(0, start[whence] + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        left = self._facts.num_bytes - self._position
        view = memoryview(buffer).cast("B")[: max(left, 0)]
        if not len(view):
            return 0
        part = Part(1, self._position, len(view))

        def place(offset: int, chunk: bytes) -> None:
            view[offset : offset + len(chunk)] = chunk

        try:
            _fetch_range(self._connection, self._name, part, self._facts, place)
        except Changed:
            raise M1Error(
                f"s3://{self._connection.bucket}/{self._name} was replaced while it was read; run "
                "the same command again"
            ) from None
        self._position += len(view)
        return len(view)


def partial_of(path: Path) -> Path:
    """Where a file lies while it is incomplete."""
    return path.parent / f".{path.name}.partial"


def _fetch(
    connection: Connection, name: str, path: Path, wanted: ObjectFacts, pool: Executor
) -> None:
    """Write what is missing of the partial file, noting each range in the journal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, journal = partial_of(path), _journal_of(path)
    arrived = _arrived(partial, wanted)
    if not arrived:
        journal.write_text(json.dumps({"etag": wanted.etag, "num_bytes": wanted.num_bytes}) + "\n")
    with partial.open("r+b" if arrived else "w+b", buffering=0) as file:
        file.truncate(wanted.num_bytes)

        def fetch(part: Part) -> None:
            crc = 0

            def place(offset: int, chunk: bytes) -> None:
                nonlocal crc
                crc = zlib.crc32(chunk, crc if offset else 0)
                os.pwrite(file.fileno(), chunk, part.start + offset)

            _fetch_range(connection, name, part, wanted, place)
            line = json.dumps({"part": part.number, "crc": f"{crc:08x}"}) + "\n"
            with journal.open("a") as stream:
                stream.write(line)

        parts = cut(wanted.num_bytes, wanted.part_bytes) if wanted.num_bytes else ()
        missing = [part for part in parts if part.number not in arrived]
        running = [pool.submit(fetch, part) for part in missing]
        wait(running)  # all of them, since they write to a file that is about to be closed
        for future in running:
            future.result()


def _fetch_range(
    connection: Connection,
    name: str,
    part: Part,
    wanted: ObjectFacts,
    place: Callable[[int, bytes], None],
) -> None:
    """Hand over the bytes of one range of this very version; from offset 0 again after a fault."""
    condition = {"If-Match": f'"{wanted.etag}"'} if wanted.etag else {}

    def get(client: "Minio") -> None:
        response = client.get_object(
            connection.bucket, name, part.start, part.num_bytes, request_headers={**condition}
        )
        try:
            offset = 0
            for chunk in _chunks(response, part.num_bytes):
                place(offset, chunk)
                offset += len(chunk)
            response.release_conn()
        finally:
            response.close()

    connection.call(get)


def _chunks(response: Any, num_bytes: int) -> Iterator[bytes]:
    """The body of a response, which must have that length and keep some pace."""
    started, received, patience = time.monotonic(), 0, stall_seconds()
    while received < num_bytes:
        chunk = response.read1(min(_CHUNK_BYTES, num_bytes - received))
        if not chunk:
            raise BadTransfer(f"{received} of {num_bytes} bytes arrived")
        received += len(chunk)
        yield chunk
        seconds = time.monotonic() - started
        if seconds > patience and received < seconds * _SLOWEST_BYTES_PER_SECOND:
            raise BadTransfer(f"{received} bytes in {seconds:.0f} s are too slow")


def _require_whole(name: str, data: bytes, found: ObjectFacts) -> None:
    parts = cut(len(data), found.part_bytes)
    if found.digest is not None:
        slices = [data[part.start : part.start + part.num_bytes] for part in parts]
        digest, right = composite([hashlib.sha256(s).digest() for s in slices]), found.digest
    elif found.md5 is not None:
        digest, right = hashlib.md5(data).hexdigest(), found.md5
    else:
        return
    if digest != right:
        raise BadTransfer(f"the content of {name} does not match its digest")


def _matches(path: Path, wanted: ObjectFacts, pool: Executor) -> bool:
    if path.stat().st_size != wanted.num_bytes or wanted.digest is None:
        return False
    parts = cut(wanted.num_bytes, wanted.part_bytes)
    found = pool.map(lambda part: part_digest(path, part).sha256, parts)
    return composite(list(found)) == wanted.digest


def _received(partial: Path, wanted: ObjectFacts) -> str | None:
    """Composite digest of what the journal says has arrived."""
    arrived = _arrived(partial, wanted)
    parts = list(cut(wanted.num_bytes, wanted.part_bytes))
    if wanted.num_bytes == 0:
        return composite([zlib.crc32(b"").to_bytes(4, "big")])
    if any(part.number not in arrived for part in parts):
        return None
    return composite([bytes.fromhex(arrived[part.number]) for part in parts])


def _arrived(partial: Path, wanted: ObjectFacts) -> dict[int, str]:
    """CRC-32 by number of the parts that an earlier attempt wrote of this version."""
    journal = partial.with_name(partial.name.removesuffix(".partial") + ".parts")
    if not partial.exists() or not journal.exists():
        return {}
    lines = []
    for line in journal.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # torn by a kill
            continue
    if not lines or lines[0] != {"etag": wanted.etag, "num_bytes": wanted.num_bytes}:
        return {}
    return {int(line["part"]): str(line["crc"]) for line in lines[1:] if "part" in line}


def _journal_of(path: Path) -> Path:
    return path.parent / f".{path.name}.parts"
