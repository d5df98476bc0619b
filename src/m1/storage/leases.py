"""A lock among machines: an object that its holder renews and others may take over when it stops.

Waiting processes measure with their own clocks how long the object has not changed, so clocks need
not agree. Taking and renewing are conditional writes: of several that try, one succeeds.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from m1.storage.connection import Changed, Connection
from m1.storage.downloads import read_object
from m1.storage.uploads import head, put_bytes
from m1.types import M1Error

RENEW_SECONDS = 10.0
EXPIRY_SECONDS = 60.0
"""A lease that did not change for this long is taken over."""
_POLL_SECONDS = 1.0


@contextlib.contextmanager
def hold_lease(
    connection: Connection,
    name: str,
    *,
    owner: str,
    timeout_seconds: float,
    renew_seconds: float = RENEW_SECONDS,
    expiry_seconds: float = EXPIRY_SECONDS,
) -> Iterator[None]:
    """Hold the lease `name` during the block.

    Args:
        connection: To the bucket.
        name: Of the object.
        owner: Who asks. A lease of the same owner is taken at once: its process is dead.
        timeout_seconds: Longest wait for another holder.
        renew_seconds: How often the object is written anew.
        expiry_seconds: After which silence of its holder it is taken over.

    Raises:
        TimeoutError: Another holder still renews it; the message says who.
    """
    etag = _take(connection, name, owner, timeout_seconds, expiry_seconds)
    ended = threading.Event()
    current = [etag]

    def renew() -> None:
        while not ended.wait(renew_seconds):
            try:
                current[0] = put_bytes(
                    connection,
                    name,
                    _content(owner),
                    condition={"If-Match": f'"{current[0]}"'},
                    patience_seconds=renew_seconds,
                )
            except Changed:
                return  # taken over after a long silence; the pointer decides who was first
            except (M1Error, OSError):
                continue

    thread = threading.Thread(target=renew, daemon=True, name=f"lease {name}")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _release(connection, name, current[0])


def _take(
    connection: Connection, name: str, owner: str, timeout_seconds: float, expiry_seconds: float
) -> str:
    deadline = time.monotonic() + timeout_seconds
    seen: tuple[str, float] | None = None
    while True:
        with contextlib.suppress(Changed):
            return put_bytes(connection, name, _content(owner), condition={"If-None-Match": "*"})
        try:
            etag = head(connection, name).etag
            holder = json.loads(read_object(connection, name))
        except FileNotFoundError:
            continue
        except ValueError:
            holder = {}
        now = time.monotonic()
        if seen is None or seen[0] != etag:
            seen = (etag, now)
        if holder.get("owner") == owner or now - seen[1] >= expiry_seconds:
            with contextlib.suppress(Changed):
                return put_bytes(
                    connection, name, _content(owner), condition={"If-Match": f'"{etag}"'}
                )
            continue
        if now >= deadline:
            raise TimeoutError(
                f"{holder.get('host')} (process {holder.get('pid')}) holds "
                f"s3://{connection.bucket}/{name}"
            )
        time.sleep(min(_POLL_SECONDS, max(deadline - now, 0.05)))


def _release(connection: Connection, name: str, etag: str) -> None:
    with contextlib.suppress(M1Error, FileNotFoundError):
        if head(connection, name).etag == etag:
            connection.call(lambda client: client.remove_object(connection.bucket, name))


def _content(owner: str) -> bytes:
    """Different at every call, so that a renewed lease has another ETag."""
    facts = {"owner": owner, "host": socket.gethostname(), "pid": os.getpid()}
    return json.dumps({**facts, "renewal": uuid.uuid4().hex}).encode()
