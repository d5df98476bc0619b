"""Pointers: small JSON files that name what is whole."""

import json
from dataclasses import asdict

from m1.storage.base import Storage
from m1.types import Pointer


def write_pointer(storage: Storage, key: str, pointer: Pointer) -> None:
    """Write `pointer` as JSON; call it after everything it points at is in place."""
    storage.write_bytes(key, _json(pointer))


def publish_pointer(storage: Storage, key: str, pointer: Pointer) -> Pointer:
    """Write `pointer` unless one of the same stage hash is there.

    Of several runs that finish one stage, the first decides where its output lies.

    Returns:
        The pointer that holds: the given one, or the one that was there.
    """
    if storage.create_bytes(key, _json(pointer)):
        return pointer
    found = read_pointer(storage, key)
    if found is not None and found.stage_hash == pointer.stage_hash:
        return found
    write_pointer(storage, key, pointer)  # torn, or of another stage: worth nothing
    return pointer


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


def _json(pointer: Pointer) -> bytes:
    return json.dumps(asdict(pointer), indent=2, sort_keys=True).encode()
