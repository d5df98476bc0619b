"""Running one bounded child process: feed it, collect bounded output, kill it in time."""

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO

from m1.sandbox.base import OutputSink

_STDERR_BYTES = 64 << 10
_CHUNK = 1 << 16
_DRAIN_SECONDS = 2.0

Pipes = tuple[IO[bytes], IO[bytes], IO[bytes]]
"""Where standard input is written, where output and errors are read."""


@dataclass
class Collected:
    """What came out of a process, and which limit ended it."""

    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    stopped_by: str | None = None


def collect(
    process: subprocess.Popen[bytes],
    stdin: bytes,
    *,
    wall_seconds: float,
    output_bytes: int,
    kill: Callable[[], None],
    on_output: OutputSink | None = None,
) -> Collected:
    """Drive the three pipes of a process; see `collect_pipes`. It has ended afterwards."""
    assert process.stdin and process.stdout and process.stderr
    pipes = (process.stdin, process.stdout, process.stderr)
    exited = os.pidfd_open(process.pid)
    try:
        return collect_pipes(
            pipes,
            exited,
            stdin,
            wall_seconds=wall_seconds,
            output_bytes=output_bytes,
            kill=kill,
            on_output=on_output,
        )
    finally:
        os.close(exited)
        if process.poll() is None:
            kill()
        process.wait()


def collect_pipes(
    pipes: Pipes,
    exited: int,
    stdin: bytes,
    *,
    wall_seconds: float,
    output_bytes: int,
    kill: Callable[[], None],
    on_output: OutputSink | None = None,
) -> Collected:
    """Feed and read three pipes until `exited` can be read or a limit is met; then `kill`.

    `on_output` sees each piece as it is kept.

    Reading goes on after the process has ended only as long as something comes: a child of it that
    holds a pipe open cannot hold us. The pipes are closed afterwards.
    """
    found = Collected()
    show = _Shown(found, on_output)
    deadline = time.monotonic() + wall_seconds
    rest = memoryview(stdin)
    source, stdout, stderr = pipes
    try:
        with selectors.DefaultSelector() as selector:
            for stream in pipes:
                os.set_blocking(stream.fileno(), False)
            selector.register(stdout, selectors.EVENT_READ)
            selector.register(stderr, selectors.EVENT_READ)
            selector.register(exited, selectors.EVENT_READ)
            if stdin:
                selector.register(source, selectors.EVENT_WRITE)
            else:
                source.close()
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    found.stopped_by = found.stopped_by or "wall"
                    break
                ready = {key.fileobj for key, _ in selector.select(left)}
                if source in ready:
                    rest = _feed(source, rest, selector)
                for stream, buffer, limit in (
                    (stdout, found.stdout, output_bytes),
                    (stderr, found.stderr, None),
                ):
                    if stream in ready and not _read(stream.fileno(), buffer, limit):
                        selector.unregister(stream)
                show.new()
                if len(found.stdout) > output_bytes:
                    found.stopped_by = "output"
                    break
                if exited in ready:
                    break
        kill()
        _drain(stdout, stderr, found, output_bytes)
        show.new(output_bytes)
    finally:
        for pipe in pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    del found.stdout[output_bytes:]
    return found


@dataclass
class _Shown:
    """How much of the output a sink has seen."""

    found: Collected
    sink: OutputSink | None
    sizes: dict[str, int] = field(default_factory=dict)

    def new(self, output_bytes: int | None = None) -> None:
        """Hand over what came since."""
        if self.sink is None:
            return
        for name, buffer, limit in (
            ("stdout", self.found.stdout, output_bytes),
            ("stderr", self.found.stderr, None),
        ):
            piece = bytes(buffer[self.sizes.get(name, 0) : limit])
            if piece:
                self.sizes[name] = self.sizes.get(name, 0) + len(piece)
                self.sink(name, piece)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the process group that `start_new_session` made."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _feed(source: IO[bytes], rest: memoryview, selector: selectors.BaseSelector) -> memoryview:
    try:
        rest = rest[os.write(source.fileno(), rest[:_CHUNK]) :]
    except BlockingIOError:
        return rest
    except BrokenPipeError:
        rest = rest[len(rest) :]
    if not len(rest):
        selector.unregister(source)
        with contextlib.suppress(BrokenPipeError):
            source.close()
    return rest


def _read(descriptor: int, buffer: bytearray, limit: int | None) -> bool:
    """Append what is there; False at the end. Without a limit only the first part is kept."""
    try:
        data = os.read(descriptor, _CHUNK)
    except BlockingIOError:
        return True
    if limit is not None or len(buffer) < _STDERR_BYTES:
        buffer += data if limit is not None else data[: _STDERR_BYTES - len(buffer)]
    return bool(data)


def _drain(stdout: IO[bytes], stderr: IO[bytes], found: Collected, output_bytes: int) -> None:
    """Read what still lies in the pipes of a dead process, at most a moment and the limit."""
    deadline = time.monotonic() + _DRAIN_SECONDS
    for stream, buffer, limit in (
        (stdout, found.stdout, output_bytes),
        (stderr, found.stderr, None),
    ):
        while time.monotonic() < deadline and len(found.stdout) <= output_bytes:
            size = len(buffer)
            if not _read(stream.fileno(), buffer, limit) or len(buffer) == size:
                break
    if len(found.stdout) > output_bytes and found.stopped_by is None:
        found.stopped_by = "output"
