"""Messages between the service and its processes: a length and JSON on a stream socket."""

import json
import select
import socket
import struct
import time
from typing import Any

_HEADER = struct.Struct("!I")
MAX_MESSAGE_BYTES = 1 << 28


class PeerGone(Exception):
    """The process at the other end is dead."""


class TimedOut(Exception):
    """No whole message came in time."""


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Write one message, however long; the socket blocks."""
    data = json.dumps(message).encode()
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(data)} bytes exceeds {MAX_MESSAGE_BYTES}")
    try:
        connection.sendall(_HEADER.pack(len(data)) + data)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise PeerGone from error


def receive(connection: socket.socket, timeout_seconds: float | None = None) -> dict[str, Any]:
    """Read one message."""
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    (size,) = _HEADER.unpack(_read(connection, _HEADER.size, deadline))
    if size > MAX_MESSAGE_BYTES:
        raise PeerGone(f"a message claims {size} bytes")
    message: dict[str, Any] = json.loads(_read(connection, size, deadline))
    return message


def is_ready(connection: socket.socket, timeout_seconds: float) -> bool:
    """Whether something, or the end, can be read within the time."""
    poll = select.poll()  # select() fails beyond 1,024 descriptors
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(1000 * timeout_seconds))


def _read(connection: socket.socket, size: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        if deadline is not None:
            left = max(0.0, deadline - time.monotonic())
            if not is_ready(connection, left):
                raise TimedOut
        try:
            part = connection.recv(min(1 << 20, size - len(data)))
        except ConnectionResetError as error:
            raise PeerGone from error
        if not part:
            raise PeerGone
        data += part
    return bytes(data)
