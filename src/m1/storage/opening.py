"""From an address to a storage."""

from pathlib import Path

from m1.storage.base import Storage
from m1.storage.local import LocalStorage
from m1.storage.s3 import S3Storage
from m1.types import M1Error


def open_storage(root: str) -> Storage:
    """Storage for a folder, a `file://` uri or `s3://bucket/prefix`; no disk or network access."""
    scheme, separator, rest = root.partition("://")
    if not separator:
        return LocalStorage(Path(root))
    if scheme == "file":
        return LocalStorage(Path(rest))
    bucket, _, prefix = rest.partition("/")
    if "@" in bucket:  # what stands before it may be a secret, so it is not repeated
        raise M1Error(
            f"a storage root of the form {scheme}://...@... is refused: addresses are written down "
            "in lineage and logs, so credentials go into AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or into files named by AWS_ACCESS_KEY_ID_FILE and "
            "AWS_SECRET_ACCESS_KEY_FILE"
        )
    if scheme != "s3" or not bucket:
        raise M1Error(
            f"storage root {root!r} is neither a folder nor s3://bucket/prefix; give one of the two"
        )
    return S3Storage(bucket, prefix.strip("/"))
