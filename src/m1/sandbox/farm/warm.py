"""Sandboxes opened before anyone asks, so that a lease starts at once."""

import contextlib
import threading
from collections import OrderedDict

from m1.sandbox.base import Backend, Environment, Limits, Sandbox, SandboxError
from m1.sandbox.farm.metrics import FarmMetrics

_Key = tuple[object, ...]


class WarmPool:
    """A few fresh sandboxes for each environment that was asked for lately."""

    def __init__(
        self, backend: Backend, metrics: FarmMetrics, *, size: int, max_environments: int
    ) -> None:
        self._backend, self._metrics = backend, metrics
        self._size, self._max = size, max_environments
        self._ready: OrderedDict[_Key, list[Sandbox]] = OrderedDict()
        self._wanted: dict[_Key, tuple[Environment, Limits]] = {}
        self._condition = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None
        if size:
            self._thread = threading.Thread(target=self._fill, name="sandbox-warmer", daemon=True)
            self._thread.start()

    def take(self, environment: Environment, limits: Limits) -> Sandbox | None:
        """One that is ready, or None; either way more are opened ahead from now on."""
        if not self._size:
            return None
        key = _key(environment, limits)
        with self._condition:
            self._wanted[key] = environment, limits
            ready = self._ready.setdefault(key, [])
            self._ready.move_to_end(key)
            found = ready.pop(0) if ready else None
            dropped: list[Sandbox] = []
            while len(self._ready) > self._max:
                old, sandboxes = self._ready.popitem(last=False)
                del self._wanted[old]
                dropped += sandboxes
            self._count()
            self._condition.notify_all()
        for sandbox in dropped:
            sandbox.close()
        return found

    def close(self) -> None:
        """Close those that nobody took."""
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()
        for sandboxes in self._ready.values():
            for sandbox in sandboxes:
                sandbox.close()
        self._ready.clear()
        self._count()

    def _fill(self) -> None:
        while True:
            with self._condition:
                while not self._is_closed and self._next() is None:
                    self._condition.wait()
                key = self._next()
                if self._is_closed or key is None:
                    return
                environment, limits = self._wanted[key]
            try:
                opened = self._backend.open(environment, limits=limits)
            except SandboxError:
                self._metrics.failed("open")
                with self._condition:  # whoever asks next meets the error itself
                    self._ready.pop(key, None)
                    self._wanted.pop(key, None)
                continue
            with self._condition:
                if key in self._ready and not self._is_closed:
                    self._ready[key].append(opened)
                    self._count()
                    continue
            with contextlib.suppress(SandboxError):
                opened.close()

    def _next(self) -> _Key | None:
        """An environment that has too few, the last asked for first."""
        for key in reversed(self._ready):
            if len(self._ready[key]) < self._size:
                return key
        return None

    def _count(self) -> None:
        self._metrics.warm.set(sum(len(sandboxes) for sandboxes in self._ready.values()))


def _key(environment: Environment, limits: Limits) -> _Key:
    layers = tuple(sorted((path, str(source)) for path, source in environment.layers.items()))
    fixed = tuple(sorted((path, str(source)) for path, source in environment.read_only.items()))
    return environment.image, layers, fixed, limits
