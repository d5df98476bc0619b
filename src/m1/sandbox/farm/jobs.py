"""Jobs in worker processes that may die at any moment: each job has exactly one outcome.

A worker is a fresh interpreter that runs one job after another. When it dies, hangs or is killed,
its job is tried again elsewhere; after the last attempt the outcome is an infrastructure error,
never a verdict. What its sandboxes left is removed, since their owner is known to be dead.
"""

import logging
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

_J = TypeVar("_J")
_R = TypeVar("_R")
_CONTEXT = multiprocessing.get_context("spawn")
_END_SECONDS = 5.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobOutcome(Generic[_J, _R]):
    """What became of one job."""

    index: int
    """Its place among the jobs."""
    job: _J
    result: _R | None
    infra_error: str | None
    """What prevented a result; None when there is one."""
    num_attempts: int
    seconds: float


@dataclass(frozen=True)
class JobsConfig:
    """How jobs are run."""

    num_workers: int = 2
    num_retries: int = 3
    """Further attempts after the death of a worker; exceptions are not tried again."""
    timeout_seconds: float = 1800.0
    """After so long the worker is killed."""


def run_jobs(
    jobs: Iterable[_J],
    work: Callable[[_J], _R],
    *,
    config: JobsConfig | None = None,
    clean_up: Callable[[], Any] | None = None,
    on_worker: Callable[[int], None] | None = None,
) -> Iterator[JobOutcome[_J, _R]]:
    """Outcomes in the order in which they come; the jobs are drawn as fast as workers take them.

    Args:
        jobs: What is sent to workers; must be picklable.
        work: A function of a module, called in a worker.
        config: Workers, attempts, time.
        clean_up: Called after each death of a worker and at the end, such as a backend's
            `collect_garbage`. What it raises is logged: other workers may be at the same garbage.
        on_worker: Told the process id of every worker that starts.
    """
    config = config or JobsConfig()
    waiting: queue.Queue[tuple[int, _J] | None] = queue.Queue(maxsize=2 * config.num_workers)
    done: queue.Queue[JobOutcome[_J, _R] | None] = queue.Queue()
    slots = [_Slot(work, config, clean_up, on_worker) for _ in range(config.num_workers)]
    threads = [
        threading.Thread(target=slot.serve, args=(waiting, done), daemon=True) for slot in slots
    ]
    failures: list[Exception] = []
    given = (jobs, waiting, config.num_workers, failures)
    feeder = threading.Thread(target=_feed, args=given, daemon=True)
    for thread in (*threads, feeder):
        thread.start()
    open_slots = config.num_workers
    while open_slots:
        outcome = done.get()
        if outcome is None:
            open_slots -= 1
        else:
            yield outcome
    _tidy(clean_up)
    if failures:
        raise failures[0]


class _Slot:
    """A place for one worker at a time."""

    def __init__(
        self,
        work: Callable[[Any], Any],
        config: JobsConfig,
        clean_up: Callable[[], Any] | None,
        on_worker: Callable[[int], None] | None,
    ) -> None:
        self._work, self._config = work, config
        self._clean_up, self._on_worker = clean_up, on_worker
        self._process: Any = None
        self._link: Connection | None = None

    def serve(self, waiting: "queue.Queue[Any]", done: "queue.Queue[Any]") -> None:
        """Take jobs until there are none; one outcome for each."""
        try:
            while (taken := waiting.get()) is not None:
                done.put(self._outcome(*taken))
        finally:
            self._stop()
            done.put(None)

    def _outcome(self, index: int, job: Any) -> JobOutcome[Any, Any]:
        """An outcome whatever happens: a thread that ended with an error would lose its job."""
        started = time.monotonic()
        try:
            return self._attempt_all(index, job)
        except Exception as error:
            self._stop()
            reason = f"{type(error).__name__}: {error}"[:2000]
            return JobOutcome(index, job, None, reason, 1, time.monotonic() - started)

    def _attempt_all(self, index: int, job: Any) -> JobOutcome[Any, Any]:
        started = time.monotonic()
        error = None
        attempts = 0
        while attempts <= self._config.num_retries:
            attempts += 1
            try:
                is_fine, value = self._attempt(job)
            except _WorkerLost as lost:
                error = str(lost)
                self._stop()
                _tidy(self._clean_up)
                continue
            seconds = time.monotonic() - started
            if is_fine:
                return JobOutcome(index, job, value, None, attempts, seconds)
            return JobOutcome(index, job, None, value, attempts, seconds)
        return JobOutcome(index, job, None, error, attempts, time.monotonic() - started)

    def _attempt(self, job: Any) -> tuple[bool, Any]:
        if self._process is None:
            self._start()
        assert self._link is not None
        try:
            self._link.send(job)
            if not wait([self._link], self._config.timeout_seconds):
                raise _WorkerLost("timeout")
            found: tuple[bool, Any] = self._link.recv()
        except (EOFError, OSError) as error:
            raise _WorkerLost("worker_died") from error
        return found

    def _start(self) -> None:
        self._link, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs, self._work), daemon=True)
        self._process.start()
        theirs.close()
        if self._on_worker is not None and self._process.pid is not None:
            self._on_worker(self._process.pid)

    def _stop(self) -> None:
        if self._process is None:
            return
        assert self._link is not None
        self._link.close()  # an idle worker ends when its link does
        self._process.join(0.5)
        self._process.kill()
        self._process.join(_END_SECONDS)
        self._process = self._link = None


class _WorkerLost(Exception):
    """The worker died or took too long."""


def _tidy(clean_up: Callable[[], Any] | None) -> None:
    if clean_up is None:
        return
    try:
        clean_up()
    except Exception:
        _log.warning("what a dead worker left could not be removed yet", exc_info=True)


def _feed(
    jobs: Iterable[Any], waiting: "queue.Queue[Any]", num_workers: int, failures: list[Exception]
) -> None:
    try:
        for index, job in enumerate(jobs):
            waiting.put((index, job))
    except Exception as error:
        failures.append(error)
    finally:
        for _ in range(num_workers):
            waiting.put(None)


def _serve(link: Connection, work: Callable[[Any], Any]) -> None:
    """In the worker: one job after another until the other side is gone."""
    while True:
        try:
            job = link.recv()
        except (EOFError, OSError):
            return
        try:
            answer = True, work(job)
        except Exception as error:
            answer = False, f"{type(error).__name__}: {error}"[:2000]
        try:
            link.send(answer)
        except OSError:
            return
