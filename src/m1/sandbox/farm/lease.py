"""A sandbox for a time.

No command outlives it, and its sandbox is closed then even if its holder hangs.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Protocol

from m1.sandbox.base import (
    MIB,
    WORK,
    ClosedAtExit,
    ExecResult,
    Limits,
    OutputSink,
    Sandbox,
    SandboxError,
    SandboxGone,
)
from m1.sandbox.farm.metrics import FarmMetrics


class Landlord(Protocol):
    """What a lease needs of its farm."""

    @property
    def metrics(self) -> FarmMetrics:
        """Where to count."""

    def released(self, held: "Lease") -> None:
        """Told once, when the sandbox is closed."""


class Lease(ClosedAtExit):
    """A sandbox for a time; a `Sandbox` itself, whose `close` gives the room back."""

    def __init__(self, farm: Landlord, sandbox: Sandbox, limits: Limits, seconds: float) -> None:
        self._farm = farm
        self._sandbox = sandbox
        self._limits = limits
        self._ends = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._num_running = 0
        self._is_closed = False
        self._has_expired = False

    @property
    def name(self) -> str:
        """The sandbox's name."""
        return self._sandbox.name

    def exec(
        self,
        command: Sequence[str],
        *,
        stdin: bytes = b"",
        limits: Limits | None = None,
        environment: Mapping[str, str] | None = None,
        folder: str = WORK,
        on_output: OutputSink | None = None,
    ) -> ExecResult:
        """Run a command, no longer than the lease lasts; see `Sandbox.exec`."""
        asked = limits or self._limits
        with self._running():
            left = max(0.1, self._ends - time.monotonic())
            result = self._sandbox.exec(
                command,
                stdin=stdin,
                limits=replace(asked, wall_seconds=min(asked.wall_seconds, left)),
                environment=environment,
                folder=folder,
                on_output=on_output,
            )
        self._farm.metrics.exec_seconds.observe(result.seconds)
        if result.stopped_by is not None:
            self._farm.metrics.failed(f"limit_{result.stopped_by}")
            if result.stopped_by == "wall" and time.monotonic() >= self._ends:
                self.end_if_expired()
                raise SandboxGone(f"the lease of {self.name} ran out during {command[0]!r}")
        return result

    def write_file(self, path: str, data: bytes, *, is_executable: bool = False) -> None:
        """See `Sandbox.write_file`."""
        with self._running():
            self._sandbox.write_file(path, data, is_executable=is_executable)

    def read_file(self, path: str, *, max_bytes: int = 8 * MIB) -> bytes:
        """See `Sandbox.read_file`."""
        with self._running():
            return self._sandbox.read_file(path, max_bytes=max_bytes)

    def write_folder(self, path: str, source: Path) -> None:
        """See `Sandbox.write_folder`."""
        with self._running():
            self._sandbox.write_folder(path, source)

    def renew(self, seconds: float) -> None:
        """Hold the sandbox for so long from now."""
        with self._running():
            self._ends = time.monotonic() + seconds

    def fork(self) -> "Lease":
        """Not through a lease: two sandboxes need two."""
        raise SandboxError("a lease is one sandbox; lease another and copy the files")

    def close(self) -> None:
        """Close the sandbox once its command has ended; may be called twice."""
        with self._lock:
            self._is_closed = True
        self._close_when_idle()

    def end_if_expired(self) -> None:
        """Close a sandbox that was held too long."""
        with self._lock:
            if self._is_closed or time.monotonic() < self._ends:
                return
            self._is_closed = self._has_expired = True
        self._farm.metrics.failed("expired")
        self._close_when_idle()

    def renew_backend(self, seconds: float) -> None:
        """Tell the backend that this process lives; a failure shows at the next command."""
        if not self._is_closed:
            try:
                self._sandbox.renew(seconds)
            except SandboxError:
                self._farm.metrics.failed("renew")

    def _running(self) -> "_Running":
        return _Running(self)

    def _begin(self) -> None:
        with self._lock:
            if self._has_expired:
                raise SandboxGone(f"the lease of {self.name} ran out")
            if self._is_closed:
                raise SandboxError("the sandbox is closed")
            self._num_running += 1

    def _end(self, error: BaseException | None) -> None:
        if isinstance(error, SandboxGone):
            self._farm.metrics.failed("gone")
        elif isinstance(error, SandboxError):
            self._farm.metrics.failed("exec")
        with self._lock:
            self._num_running -= 1
        self._close_when_idle()

    def _close_when_idle(self) -> None:
        with self._lock:
            if not self._is_closed or self._num_running:
                return
            self._num_running = -1  # nobody closes it again
        try:
            self._sandbox.close()
        finally:
            self._farm.released(self)


class _Running:
    """While a command runs, its sandbox is not closed under it."""

    def __init__(self, held: Lease) -> None:
        self._held = held

    def __enter__(self) -> None:
        self._held._begin()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held._end(error)
