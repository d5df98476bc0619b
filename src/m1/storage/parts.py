"""How a file is cut into parts, and the digest that is kept with every object.

The digest is S3's composite SHA-256 in hexadecimal: sha256(sha256(part 1) + sha256(part 2) + ...),
so parts are hashed side by side; a composite of CRC-32s, which is cheaper, stands beside it for
downloads. Both are in the object's metadata, since not every server keeps checksums of its own.
"""

import hashlib
import math
import os
import zlib
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BODY_SHA256 = "x-amz-content-sha256"
"""Header with the hexadecimal digest of a request's body, which the server compares."""
PART_BYTES = 16 << 20
_MAX_PARTS = 9_000
"""S3 takes 10,000."""
_DIGEST, _CRC = "x-amz-meta-m1-sha256", "x-amz-meta-m1-crc32"
_PART_BYTES = "x-amz-meta-m1-part-bytes"


@dataclass(frozen=True)
class Part:
    """A range of a file: number from 1, first byte, length in bytes."""

    number: int
    start: int
    num_bytes: int


@dataclass(frozen=True)
class ObjectFacts:
    """What a HEAD request says."""

    num_bytes: int
    etag: str
    digest: str | None
    """Composite SHA-256; None for an object that something else wrote."""
    part_bytes: int
    crc: str | None = None
    """Composite CRC-32, which a download compares: many times cheaper than a SHA-256."""

    @property
    def md5(self) -> str | None:
        """MD5 of the content where the ETag is one."""
        is_md5 = len(self.etag) == 32 and not set(self.etag.lower()) - set("0123456789abcdef")
        return self.etag.lower() if is_md5 else None


def part_bytes_of(num_bytes: int) -> int:
    """Size of the parts of a file: 16 MiB, or more where those would be too many."""
    needed = math.ceil(num_bytes / _MAX_PARTS / (1 << 20)) << 20
    return max(PART_BYTES, needed)


def cut(num_bytes: int, part_bytes: int) -> Iterator[Part]:
    """The parts of a file; one empty part for an empty file."""
    for number, start in enumerate(range(0, max(num_bytes, 1), part_bytes), start=1):
        yield Part(number, start, min(part_bytes, num_bytes - start))


def read_part(path: Path, part: Part) -> bytes:
    """The bytes of one part.

    Raises:
        RuntimeError: The file became shorter.
    """
    with path.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), part.num_bytes, part.start)
        while len(data) < part.num_bytes:  # Linux reads at most 2 GiB at once
            more = os.pread(file.fileno(), part.num_bytes - len(data), part.start + len(data))
            if not more:
                raise RuntimeError(f"{path} became shorter while it was uploaded")
            data += more
    return data


@dataclass(frozen=True)
class PartDigest:
    """Digests of one part."""

    sha256: bytes
    crc: bytes
    """CRC-32, big-endian."""


def part_digest(path: Path, part: Part) -> PartDigest:
    """Digests of one part of a file."""
    return digests_of(read_part(path, part))


def digests_of(data: bytes) -> PartDigest:
    """Digests of the bytes of one part."""
    return PartDigest(hashlib.sha256(data).digest(), zlib.crc32(data).to_bytes(4, "big"))


def composite(digests: Sequence[bytes]) -> str:
    """Digest of a file from those of its parts, in order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def checksums(digest: PartDigest) -> dict[str, str]:
    """Headers by which a server refuses altered bytes.

    S3 and MinIO compare the SHA-256 that the signature covers; SeaweedFS only the CRC-32.
    """
    crc = b64encode(digest.crc).decode()
    return {BODY_SHA256: digest.sha256.hex(), "x-amz-checksum-crc32": crc}


def metadata_headers(digests: Sequence[PartDigest], part_bytes: int) -> dict[str, str]:
    """Headers that keep the digests with an object."""
    return {
        _DIGEST: composite([digest.sha256 for digest in digests]),
        _CRC: composite([digest.crc for digest in digests]),
        _PART_BYTES: str(part_bytes),
    }


def facts(headers: Mapping[str, str]) -> ObjectFacts:
    """From the headers of a HEAD or GET response."""
    lower = {name.lower(): value for name, value in headers.items()}
    size = int(lower.get("content-length", 0))
    given = lower.get(_PART_BYTES, "")
    part_bytes = int(given) if given.isdigit() and int(given) > 0 else part_bytes_of(size)
    etag = lower.get("etag", "").strip('"')
    return ObjectFacts(size, etag, lower.get(_DIGEST), part_bytes, lower.get(_CRC))
