"""A bounded number of sandboxes for any number of callers in this process.

Callers wait in the order they came; beyond `max_waiting` they are refused at once, so that a queue
cannot grow without end. A lease ends: no command outlives it, and its sandbox is closed then even
if its holder hangs.
"""

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from m1.sandbox.base import (
    MIB,
    WORK,
    Backend,
    Environment,
    ExecResult,
    Limits,
    OutputSink,
    Sandbox,
    SandboxError,
    SandboxGone,
)
from m1.sandbox.farm.metrics import FarmMetrics
from m1.sandbox.farm.warm import WarmPool

_KEEPER_SECONDS = 0.5


class FarmFull(SandboxError):
    """More callers wait than the farm allows: try later, or open a larger one."""


@dataclass(frozen=True)
class FarmConfig:
    """Sizes of a farm."""

    max_sandboxes: int = 8
    """In use at once; those opened ahead come on top."""
    max_waiting: int = 1024
    """Callers that may wait; the next is refused."""
    num_warm: int = 0
    """Sandboxes opened ahead for each environment asked for."""
    max_warm_environments: int = 4
    """Environments that are kept warm; the one asked for longest ago is dropped."""
    lease_seconds: float = 1800.0
    """How long a sandbox may be held."""
    heartbeat_seconds: float = 300.0
    """A cluster ends what was not renewed for three times as long."""


class Farm:
    """Leases of sandboxes; threads share it, and it must be closed."""

    def __init__(
        self,
        backend: Backend,
        config: FarmConfig | None = None,
        *,
        metrics: FarmMetrics | None = None,
    ) -> None:
        """Remove what dead owners left, then serve.

        Args:
            backend: What opens sandboxes.
            config: Sizes.
            metrics: Where to count; own ones otherwise.
        """
        self.config = config or FarmConfig()
        self.backend = backend
        self.metrics = metrics or FarmMetrics(backend.name)
        self.backend.collect_garbage()
        self._condition = threading.Condition()
        self._tickets: deque[object] = deque()
        self._leases: set[Lease] = set()
        self._num_opening = 0
        self._warm = WarmPool(
            backend,
            self.metrics,
            size=self.config.num_warm,
            max_environments=self.config.max_warm_environments,
        )
        self._closing = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="sandbox-keeper", daemon=True)
        self._keeper.start()

    def lease(
        self,
        environment: Environment | None = None,
        *,
        limits: Limits | None = None,
        seconds: float | None = None,
        timeout_seconds: float | None = None,
    ) -> "Lease":
        """A fresh sandbox once there is room; nobody else ever gets it.

        Args:
            environment: What it begins with.
            limits: Defaults of its commands.
            seconds: How long it may be held; `lease_seconds` otherwise.
            timeout_seconds: How long to wait for room; for ever otherwise.

        Raises:
            FarmFull: Too many wait already, or no room came in time.
            SandboxError: The backend could not open one, or the farm is closed.
        """
        environment, limits = environment or Environment(), limits or Limits()
        asked = time.monotonic()
        self._wait_for_room(timeout_seconds)
        admitted = time.monotonic()
        self.metrics.queue_seconds.observe(admitted - asked)
        try:
            sandbox = self._warm.take(environment, limits) or self.backend.open(
                environment, limits=limits
            )
        except BaseException:
            self.metrics.failed("open")
            with self._condition:
                self._num_opening -= 1
                self._condition.notify_all()
            raise
        self.metrics.start_seconds.observe(time.monotonic() - admitted)
        held = Lease(self, sandbox, limits, seconds or self.config.lease_seconds)
        with self._condition:
            self._num_opening -= 1
            self._leases.add(held)
            self._count()
        return held

    def close(self) -> None:
        """Close every sandbox; callers that wait are refused."""
        self._closing.set()
        with self._condition:
            self._condition.notify_all()
            leases = list(self._leases)
        for held in leases:
            held.close()
        self._keeper.join()
        self._warm.close()

    def __enter__(self) -> Self:
        """The farm itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def released(self, held: "Lease") -> None:
        """Make room for the next; called by the lease."""
        with self._condition:
            self._leases.discard(held)
            self._count()
            self._condition.notify_all()

    def _wait_for_room(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        ticket = object()

        def is_mine() -> bool:
            used = len(self._leases) + self._num_opening
            return self._tickets[0] is ticket and used < self.config.max_sandboxes

        with self._condition:
            if len(self._tickets) >= self.config.max_waiting:
                self.metrics.failed("full")
                raise FarmFull(
                    f"{len(self._tickets)} callers wait already (max_waiting "
                    f"{self.config.max_waiting}); slow down or raise max_sandboxes"
                )
            self._tickets.append(ticket)
            self._count()
            try:
                while not is_mine():
                    if self._closing.is_set():
                        raise SandboxError("the farm is closed")
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0:
                        self.metrics.failed("full")
                        raise FarmFull(f"no room within {timeout} s")
                    self._condition.wait(left)
                if self._closing.is_set():
                    raise SandboxError("the farm is closed")
                self._num_opening += 1
            finally:
                self._tickets.remove(ticket)
                self._count()
                self._condition.notify_all()

    def _count(self) -> None:
        self.metrics.leased.set(len(self._leases))
        self.metrics.waiting.set(len(self._tickets))

    def _keep(self) -> None:
        """End leases in time, and tell a cluster that we live."""
        beat = time.monotonic() + self.config.heartbeat_seconds
        while not self._closing.wait(_KEEPER_SECONDS):
            with self._condition:
                leases = list(self._leases)
            for held in leases:
                held.end_if_expired()
            if time.monotonic() > beat:
                beat = time.monotonic() + self.config.heartbeat_seconds
                for held in leases:
                    held.renew_backend(3 * self.config.heartbeat_seconds)


class Lease:
    """A sandbox for a time; a `Sandbox` itself, whose `close` gives the room back."""

    def __init__(self, farm: Farm, sandbox: Sandbox, limits: Limits, seconds: float) -> None:
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

    def __enter__(self) -> Self:
        """The lease itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

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
