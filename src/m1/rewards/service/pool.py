"""The service itself: a bounded pool of workers, each job to a verdict or a named failure."""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Self

from m1.rewards.registry import kind_of, spec_of
from m1.rewards.service import wire
from m1.rewards.service.forking import Clock, Nursery, NurseryLost, Worker
from m1.rewards.service.metrics import Metrics
from m1.rewards.service.queues import FairQueue
from m1.sandbox import cgroup
from m1.sandbox.base import SandboxError
from m1.types import Task, Verdict

_LOADING_SECONDS = 120.0
"""How long a worker may take to import a verifier; not part of the verdict's time."""
_READING_SECONDS = 5.0


@dataclass(frozen=True)
class ServiceConfig:
    """Sizes of the service."""

    num_workers: int = 0
    """Worker processes; 0 means one for each core."""
    max_waiting: int = 1024
    """Jobs in the queue before `submit` waits."""
    num_retries: int = 1
    """Further attempts after an infrastructure failure; verdicts are never retried."""
    cache_entries: int = 100_000
    """Verdicts remembered by content; 0 for none."""
    jobs_per_worker: int = 2000
    """A worker is replaced after so many, whatever its libraries have leaked."""
    timeout_scale: float = 1.0
    """Multiplies every verifier's time."""


@dataclass(frozen=True)
class Judgement:
    """A verdict, or the name of what prevented it."""

    verdict: Verdict | None
    infra_error: str | None
    seconds: float
    """From taking the job to its end, retries included; 0 from the cache."""
    wait_seconds: float = 0.0
    num_attempts: int = 1
    is_cached: bool = False


@dataclass(frozen=True)
class _Job:
    task: Task
    completion: str
    key: str
    future: "Future[Judgement]"
    submitted: float


@dataclass(frozen=True)
class _Outcome:
    verdict: Verdict | None = None
    infra_error: str | None = None
    was_trouble: bool = False
    is_retried: bool = True


class RewardService:
    """Verdicts from worker processes; threads may share it, and it must be closed.

    A worker that outlives its verifier's time is killed. If it was busy, the answer is to blame
    and gets the verdict 0 with the reason `timeout`; if it was idle or had no processor, the
    failure is ours, and is tried again. The same holds for memory (`memory`, 0) and a crash (ours).
    """

    def __init__(self, config: ServiceConfig | None = None) -> None:
        self._config = config or ServiceConfig()
        num_workers = self._config.num_workers or os.cpu_count() or 1
        self._queue: FairQueue[_Job] = FairQueue(
            num_workers=num_workers, max_waiting=self._config.max_waiting
        )
        self._metrics = Metrics()
        self._cache: OrderedDict[str, Verdict] = OrderedDict()
        self._lock = threading.Lock()
        self._nursery_lock = threading.Lock()
        self._nursery: Nursery | None = None
        self._preloaded: set[str] = set()
        self._threads = [
            threading.Thread(target=self._serve, name=f"reward-worker-{i}", daemon=True)
            for i in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        """The service itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def submit(self, task: Task, completion: str) -> "Future[Judgement]":
        """Queue a job; waits while the queue is full.

        Raises:
            M1Error: The task's verifier is not known.
        """
        spec_of(task.verifier)
        kind = kind_of(task.verifier)
        key = content_key(task, completion)
        future: Future[Judgement] = Future()
        with self._lock:
            known = self._cache.get(key)
            if known is not None:
                self._cache.move_to_end(key)
        if known is not None:
            self._metrics.add(kind, jobs=1, cache_hits=1)
            future.set_result(Judgement(known, None, 0.0, is_cached=True))
            return future
        self._queue.put(kind, _Job(task, completion, key, future, time.monotonic()))
        return future

    def judge(self, task: Task, completion: str) -> Judgement:
        """One job, waited for."""
        return self.submit(task, completion).result()

    def judge_all(self, jobs: Iterable[tuple[Task, str]]) -> Iterator[Judgement]:
        """Judgements in the order of the jobs, which are drawn as fast as the queue takes them."""
        window: list[Future[Judgement]] = []
        for task, completion in jobs:
            window.append(self.submit(task, completion))
            while window and (window[0].done() or len(window) > 2 * self._config.max_waiting):
                yield window.pop(0).result()
        for future in window:
            yield future.result()

    def metrics(self) -> dict[str, float]:
        """Counters by kind: jobs, verdicts, cache hits, timeouts, failures, waiting, seconds."""
        waiting = {f"rewards/{kind}/waiting": d for kind, d in self._queue.depths().items()}
        return {**self._metrics.snapshot(), **waiting}

    def close(self) -> None:
        """Fail what still waits, end the workers, remove what killed ones left."""
        for job in self._queue.close():
            job.future.set_result(Judgement(None, "service_closed", 0.0))
        for thread in self._threads:
            thread.join()
        with self._nursery_lock:
            if self._nursery is not None:
                self._nursery.close()
                self._nursery = None
        cgroup.sweep()

    def _serve(self) -> None:
        """One slot: a thread that owns at most one worker."""
        worker: Worker | None = None
        num_jobs = 0
        while (taken := self._queue.take()) is not None:
            kind, job = taken
            started = time.monotonic()
            attempts = 0
            while True:
                attempts += 1
                if worker is None or num_jobs >= self._config.jobs_per_worker:
                    worker, num_jobs = self._replace(worker, kind), 0
                num_jobs += 1
                outcome = self._attempt(worker, kind, job)
                if outcome.was_trouble:
                    self._discard(worker)
                    worker = None
                is_final = outcome.verdict is not None or not outcome.is_retried
                if is_final or attempts > self._config.num_retries:
                    break
                self._metrics.add(kind, retries=1)
            self._queue.done(kind, was_trouble=outcome.was_trouble)
            self._finish(kind, job, outcome, started, attempts)
        self._discard(worker)

    def _attempt(self, worker: Worker | None, kind: str, job: _Job) -> _Outcome:
        if worker is None:
            return _Outcome(infra_error="no_worker", was_trouble=True)
        timeout = spec_of(job.task.verifier).timeout_seconds * self._config.timeout_scale
        clock: Clock | None = None
        try:
            wire.send(worker.connection, {"task": asdict(job.task), "completion": job.completion})
            answer = wire.receive(worker.connection, _LOADING_SECONDS)
            if "started" in answer:
                clock = Clock(worker, timeout)
                if not wire.is_ready(worker.connection, timeout):
                    raise wire.TimedOut
                answer = wire.receive(worker.connection, _READING_SECONDS)
        except wire.TimedOut:
            self._metrics.add(kind, timeouts=1)
            error = "loading_timed_out" if clock is None else clock.failure()
            if error is None:
                return _Outcome(Verdict(0.0, "timeout"), was_trouble=True)
            return _Outcome(infra_error=error, was_trouble=True)
        except wire.PeerGone:
            self._metrics.add(kind, crashes=1)
            return _Outcome(infra_error="worker_crashed", was_trouble=True)
        except (TypeError, ValueError) as error:
            return _Outcome(infra_error=f"unsendable: {error}", is_retried=False)
        return self._understood(kind, answer)

    def _understood(self, kind: str, answer: dict[str, Any]) -> _Outcome:
        if "error" in answer:
            self._metrics.add(kind, errors=1)
            return _Outcome(
                infra_error=f"verifier_error: {answer['error']}",
                is_retried=answer.get("is_retried", False),
            )
        if "exhausted" in answer:
            self._metrics.add(kind, exhausted=1)
            return _Outcome(Verdict(0.0, answer["exhausted"]))
        return _Outcome(Verdict(answer["accuracy"], answer["reason"], answer["parts"]))

    def _finish(
        self, kind: str, job: _Job, outcome: _Outcome, started: float, attempts: int
    ) -> None:
        now = time.monotonic()
        if outcome.verdict is not None:
            self._remember(job.key, outcome.verdict)
        is_failed = outcome.verdict is None
        wait = started - job.submitted
        self._metrics.add(
            kind,
            jobs=1,
            verdicts=float(not is_failed),
            infra_errors=float(is_failed),
            busy_seconds=now - started,
            wait_seconds=wait,
        )
        error = outcome.infra_error if is_failed else None
        job.future.set_result(Judgement(outcome.verdict, error, now - started, wait, attempts))

    def _remember(self, key: str, verdict: Verdict) -> None:
        with self._lock:
            self._cache[key] = replace(verdict, parts=dict(verdict.parts))
            while len(self._cache) > self._config.cache_entries:
                self._cache.popitem(last=False)

    def _replace(self, worker: Worker | None, kind: str) -> Worker | None:
        self._discard(worker)
        with contextlib.suppress(NurseryLost):
            return self._open_nursery(kind).spawn()
        return None

    def _discard(self, worker: Worker | None) -> None:
        if worker is not None:
            worker.close()
            with contextlib.suppress(OSError, SandboxError):  # closing sweeps again, and tells
                cgroup.sweep()

    def _open_nursery(self, kind: str) -> Nursery:
        """The live nursery, with this kind's libraries imported."""
        with self._nursery_lock:
            if self._nursery is None or self._nursery.is_lost:
                self._nursery = Nursery()
                self._preloaded.clear()
            if kind not in self._preloaded:
                self._nursery.preload(kind)
                self._preloaded.add(kind)
            return self._nursery


def content_key(task: Task, completion: str) -> str:
    """Digest of all that a verdict depends on."""
    parts = [task.verifier, task.prompt, task.reference, task.metadata, completion]
    # surrogatepass: a completion may hold what no UTF-8 text can.
    data = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(data.encode("utf-8", "surrogatepass")).hexdigest()
