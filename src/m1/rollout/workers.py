"""Several engines behind HTTP as one: prompts go to whoever is free, and on if that one dies."""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from m1.config.schema import SamplingConfig
from m1.inference.client import EngineUnavailableError, HttpEngine
from m1.inference.engine import Request
from m1.types import Completion, M1Error

_RETRY_SECONDS = 1.0
_MAX_REQUESTS = 512


class PoolClosedError(M1Error):
    """The pool was closed while a request was under way."""


class Worker(Protocol):
    """Where an engine is."""

    name: str

    def connect(self) -> HttpEngine:
        """Start it if need be, and wait until it answers.

        Raises:
            EngineUnavailableError: It does not.
        """

    def close(self) -> None:
        """End what `connect` started."""


@dataclass(eq=False)
class _Slot:
    worker: Worker
    engine: HttpEngine | None = None
    """None while it is dead."""
    num_open: int = 0
    error: str = ""
    """Why it was last found dead."""


class WorkerPool:
    """An `Engine` of workers. Threads may share it, and it must be closed.

    A request whose worker does not answer is sent to another one, with the same seeds; the dead one
    is started again, or asked again, beside. It gets the newest weights before it takes requests.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        *,
        max_attempts: int,
        patience_seconds: float = 300.0,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Connect to all, at once.

        Args:
            workers: At least one.
            max_attempts: Workers that a request is tried on.
            patience_seconds: How long a request waits while all are dead.
            warn: Told of every worker that dies.

        Raises:
            M1Error: One cannot be reached.
        """
        self._slots = [_Slot(worker) for worker in workers]
        self._max_attempts, self._patience = max_attempts, patience_seconds
        self._warn = warn
        self._changed = threading.Condition()
        self._weights: tuple[str, int] | None = None
        self._is_closed = False
        self.num_deaths = 0
        with ThreadPoolExecutor(len(workers)) as threads:
            connecting = [threads.submit(slot.worker.connect) for slot in self._slots]
        errors = [future.exception() for future in connecting]
        if any(errors):
            self.close()
            raise next(error for error in errors if error is not None)
        for slot, future in zip(self._slots, connecting, strict=True):
            slot.engine = future.result()
        self.policy_version = max(future.result().policy_version for future in connecting)

    def generate(
        self, requests: Sequence[Request], sampling: SamplingConfig
    ) -> list[list[Completion]]:
        """Completions of every request, in order of its seeds.

        Raises:
            M1Error: A request is refused, or found no worker that would answer it.
        """
        if len(requests) < 2:
            return [self._one(request, sampling) for request in requests]
        with ThreadPoolExecutor(min(len(requests), _MAX_REQUESTS)) as threads:
            return list(threads.map(lambda request: self._one(request, sampling), requests))

    def load_weights(self, uri: str, version: int) -> None:
        """Have all workers go on with the weights at `uri`; completions under way are carried over.

        Raises:
            M1Error: A worker refuses them.
        """
        with self._changed:
            self._weights = (uri, version)
            self.policy_version = version
            living = [(slot, slot.engine) for slot in self._slots if slot.engine is not None]

        def load(slot: _Slot, engine: HttpEngine) -> None:
            try:
                engine.load_weights(uri, version)
            except EngineUnavailableError as error:
                self._bury(slot, engine, error)

        if living:
            with ThreadPoolExecutor(len(living)) as threads:
                for future in [threads.submit(load, *pair) for pair in living]:
                    future.result()

    def join(self, worker: Worker) -> None:
        """Take in a further worker, beside; it gets the newest weights before requests."""
        slot = _Slot(worker, error="it has not answered yet")
        with self._changed:
            if self._is_closed:
                return
            self._slots.append(slot)
        threading.Thread(target=self._revive, args=(slot,), daemon=True).start()

    def close(self) -> None:
        """End the workers that were started here; requests under way find no other.

        One that waits for a given server goes on until that answers, in its caller's thread.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for slot in self._slots:
            slot.worker.close()
            # A connection that is closed under a thread that reads from it may leave it waiting.
            if slot.engine is not None and not slot.num_open:
                slot.engine.close()

    def _one(self, request: Request, sampling: SamplingConfig) -> list[Completion]:
        error: Exception | None = None
        for _ in range(self._max_attempts):
            slot, engine = self._take()
            try:
                return engine.generate([request], sampling)[0]
            except EngineUnavailableError as refused:
                error = refused
                self._bury(slot, engine, refused)
            finally:
                with self._changed:
                    slot.num_open -= 1
                    self._changed.notify_all()
        raise M1Error(
            f"a request failed on {self._max_attempts} workers (rl.rollout.max_attempts), the last "
            f"time because {error}"
        )

    def _take(self) -> tuple[_Slot, HttpEngine]:
        """The living worker with the fewest requests."""
        deadline = time.monotonic() + self._patience
        with self._changed:
            while True:
                if self._is_closed:
                    raise PoolClosedError("the workers were closed")
                living = [slot for slot in self._slots if slot.engine is not None]
                if living:
                    slot = min(living, key=lambda slot: slot.num_open)
                    slot.num_open += 1
                    assert slot.engine is not None
                    return slot, slot.engine
                left = deadline - time.monotonic()
                if left <= 0:
                    reasons = "; ".join(f"{s.worker.name}: {s.error}" for s in self._slots)
                    raise M1Error(
                        f"all rollout workers are dead since {self._patience:g} seconds ({reasons})"
                        "; mend or restart them, and run the same command to go on"
                    )
                self._changed.wait(left)

    def _bury(self, slot: _Slot, engine: HttpEngine, error: Exception) -> None:
        with self._changed:
            if slot.engine is not engine or self._is_closed:  # another thread was first
                return
            slot.engine, slot.error = None, str(error)
            self.num_deaths += 1
        self._warn(f"rollout worker {slot.worker.name} is dead, its requests go elsewhere: {error}")
        threading.Thread(target=self._revive, args=(slot,), daemon=True).start()

    def _revive(self, slot: _Slot) -> None:
        engine: HttpEngine | None = None
        loaded: tuple[str, int] | None = None
        while not self._is_closed:
            try:
                engine = engine or slot.worker.connect()
                with self._changed:
                    wanted = self._weights
                    if wanted == loaded and not self._is_closed:
                        slot.engine = engine
                        self._changed.notify_all()
                        return
                if wanted is not None:
                    engine.load_weights(*wanted)
                loaded = wanted
            except M1Error as error:
                slot.error, engine, loaded = str(error), None, None
                with self._changed:
                    if not self._is_closed:
                        self._changed.wait(_RETRY_SECONDS)
        if engine is not None:
            with contextlib.suppress(Exception):
                engine.close()
        slot.worker.close()
