"""A bounded number of sandboxes for any number of callers in this process.

Callers wait in the order they came; beyond `max_waiting` they are refused at once, so that a queue
cannot grow without end. A lease ends: no command outlives it, and its sandbox is closed then even
if its holder hangs.
"""

import threading
import time
from collections import deque
from dataclasses import dataclass

from m1.sandbox.base import (
    Backend,
    ClosedAtExit,
    Environment,
    Limits,
    SandboxError,
)
from m1.sandbox.farm.lease import Lease
from m1.sandbox.farm.metrics import FarmMetrics, MetricsPage
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
    metrics_port: int | None = None
    """Where Prometheus reads the farm's numbers, at `/metrics` of every address; 0: a free port,
    None: nowhere."""


class Farm(ClosedAtExit):
    """Leases of sandboxes; threads share it, and it must be closed.

    Itself a `base.Backend`, whose sandboxes are leases.
    """

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

        Raises:
            SandboxError: The port of the metrics is taken.
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
        port = self.config.metrics_port
        self._page = None if port is None else MetricsPage(self.metrics, port)
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
    ) -> Lease:
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

    @property
    def metrics_port(self) -> int | None:
        """Where the farm's numbers are read; None: nowhere."""
        return None if self._page is None else self._page.port

    @property
    def name(self) -> str:
        """The backend's."""
        return self.backend.name

    def open(
        self, environment: Environment | None = None, *, limits: Limits | None = None
    ) -> Lease:
        """A lease, however long it takes to get one; see `lease`."""
        return self.lease(environment, limits=limits)

    def collect_garbage(self) -> int:
        """The backend's."""
        return self.backend.collect_garbage()

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
        if self._page is not None:
            self._page.close()

    def released(self, held: Lease) -> None:
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
