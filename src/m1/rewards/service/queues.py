"""Jobs waiting by kind of verifier, served in turn, so that no kind can starve the others."""

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

J = TypeVar("J")

_WATCHED = 20
"""Recent jobs of a kind that decide whether it is in trouble."""
_TROUBLED_SHARE = 0.25
"""Share of them that hung or crashed from which a kind loses workers."""


@dataclass
class _Kind(Generic[J]):
    waiting: deque[J] = field(default_factory=deque)
    running: int = 0
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=_WATCHED))

    @property
    def is_troubled(self) -> bool:
        return sum(self.recent) >= _TROUBLED_SHARE * _WATCHED


class FairQueue(Generic[J]):
    """A bounded queue with one line for each kind; takes go round the lines.

    While a kind is in trouble and others wait, it may hold half of the workers only.
    """

    def __init__(self, *, num_workers: int, max_waiting: int) -> None:
        self._num_workers = num_workers
        self._max_waiting = max_waiting
        self._kinds: dict[str, _Kind[J]] = {}
        self._order: deque[str] = deque()
        self._changed = threading.Condition()
        self._num_waiting = 0
        self._is_closed = False

    def put(self, kind: str, job: J) -> None:
        """Add a job; waits while the queue is full."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._num_waiting < self._max_waiting)
            if self._is_closed:
                raise RuntimeError("the reward service is closed")
            if kind not in self._kinds:
                self._kinds[kind] = _Kind()
                self._order.append(kind)
            self._kinds[kind].waiting.append(job)
            self._num_waiting += 1
            self._changed.notify_all()

    def take(self) -> tuple[str, J] | None:
        """The next job, with its kind marked as running; None once closed."""
        with self._changed:
            while True:
                if self._is_closed:
                    return None
                kind = self._next_kind()
                if kind is not None:
                    break
                self._changed.wait()
            self._order.remove(kind)
            self._order.append(kind)
            state = self._kinds[kind]
            state.running += 1
            self._num_waiting -= 1
            self._changed.notify_all()
            return kind, state.waiting.popleft()

    def done(self, kind: str, *, was_trouble: bool) -> None:
        """Tell that a job that was taken has ended, and whether its worker hung or crashed."""
        with self._changed:
            self._kinds[kind].running -= 1
            self._kinds[kind].recent.append(was_trouble)
            self._changed.notify_all()

    def close(self) -> list[J]:
        """End all takes; the jobs that nobody took."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            left = [job for kind in self._kinds.values() for job in kind.waiting]
            for kind in self._kinds.values():
                kind.waiting.clear()
            return left

    def depths(self) -> dict[str, int]:
        """Waiting jobs by kind."""
        with self._changed:
            return {kind: len(state.waiting) for kind, state in self._kinds.items()}

    def _next_kind(self) -> str | None:
        ready = [kind for kind in self._order if self._kinds[kind].waiting]
        allowed = max(1, self._num_workers // 2)
        for kind in ready:
            state = self._kinds[kind]
            if len(ready) == 1 or not state.is_troubled or state.running < allowed:
                return kind
        return None
