"""Artifacts in a folder or below `s3://bucket/prefix`, behind one interface; digests, pointers.

Names that start with "." are work in progress: neither copied, nor listed, nor part of a digest.
A pointer is written after everything it points at, so what a pointer names is whole.
"""

from m1.storage.base import Storage
from m1.storage.disk import atomic_write, disk_errors, folder_digest
from m1.storage.local import LocalStorage
from m1.storage.opening import open_storage
from m1.storage.pointers import publish_pointer, read_pointer, write_pointer
from m1.storage.s3 import S3Storage

__all__ = [
    "LocalStorage",
    "S3Storage",
    "Storage",
    "atomic_write",
    "disk_errors",
    "folder_digest",
    "open_storage",
    "publish_pointer",
    "read_pointer",
    "write_pointer",
]
