import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from grading_job import grade, hang

from m1.sandbox import bubblewrap
from m1.sandbox.farm.jobs import JobsConfig, run_jobs
from m1.sandbox.local import BubblewrapBackend

pytestmark = pytest.mark.skipif(
    bubblewrap.failure() is not None, reason=f"no sandbox here: {bubblewrap.failure()}"
)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Workers are fresh interpreters: they find the job beside this file."""
    path = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    monkeypatch.setenv("PYTHONPATH", path)


class Killer:
    """Kills a random living worker again and again, at most `most` times."""

    def __init__(self, seconds, seed=0, most=10**9):
        self.pids, self.num_kills, self._most = [], 0, most
        self._random, self._seconds = random.Random(seed), seconds
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._kill, daemon=True)
        self._thread.start()

    def close(self):
        self._is_done.set()
        self._thread.join()

    def _kill(self):
        while not self._is_done.wait(self._random.uniform(0.5, 1.5) * self._seconds):
            if self.pids and self.num_kills < self._most:
                try:
                    os.kill(self._random.choice(self.pids[-2:]), signal.SIGKILL)
                    self.num_kills += 1
                except ProcessLookupError:
                    continue


def left():
    """Folders, groups and mounts of sandboxes whose owner is dead; memory of this process."""
    return BubblewrapBackend().collect_garbage()


def check(outcomes, num_jobs):
    assert Counter(outcome.index for outcome in outcomes) == Counter(range(num_jobs))
    for outcome in outcomes:
        if outcome.infra_error is None:
            assert outcome.result == (outcome.job % 2 == 0)
        else:
            assert outcome.result is None


def test_every_job_has_one_outcome_though_workers_are_killed():
    killer = Killer(0.3, most=12)
    config = JobsConfig(num_workers=2, num_retries=20)
    jobs = range(60)
    outcomes = list(
        run_jobs(
            jobs,
            grade,
            config=config,
            clean_up=BubblewrapBackend().collect_garbage,
            on_worker=killer.pids.append,
        )
    )
    killer.close()
    check(outcomes, 60)
    errors = {outcome.job: outcome.infra_error for outcome in outcomes if outcome.infra_error}
    assert errors == {13: "ValueError: thirteen"}
    assert killer.num_kills > 0
    assert max(outcome.num_attempts for outcome in outcomes) > 1
    assert left() == 0


def test_neither_a_failing_clean_up_nor_failing_jobs_lose_an_outcome():
    def refuse():
        raise OSError("busy")

    def drawn():
        yield from (13, 0)
        raise ValueError("no more")

    config = JobsConfig(num_workers=1, num_retries=1, timeout_seconds=1)
    outcomes = list(run_jobs([0], hang, config=config, clean_up=refuse))
    assert [outcome.infra_error for outcome in outcomes] == ["timeout"]
    found = []
    with pytest.raises(ValueError, match="no more"):
        for outcome in run_jobs(drawn(), grade):
            found.append(outcome.job)
    assert sorted(found) == [0, 13]


def test_a_job_that_hangs_is_an_infrastructure_error():
    config = JobsConfig(num_workers=1, num_retries=1, timeout_seconds=1)
    started = time.monotonic()
    (outcome,) = run_jobs([0], hang, config=config)
    assert (outcome.infra_error, outcome.result, outcome.num_attempts) == ("timeout", None, 2)
    assert time.monotonic() - started < 30


@pytest.mark.exhaustive
def test_two_thousand_jobs_leave_disk_and_memory_as_they_were():
    def state():
        """Folders and mounts of this test's workers, and descriptors of this process."""
        owners = [f"m1-sandbox-{pid}." for pid in killer.pids]
        folders = [p.name for p in Path("/tmp").iterdir() if p.name.startswith(tuple(owners))]
        mounts = Path("/proc/self/mounts").read_text()
        return folders, [o for o in owners if o in mounts], len(os.listdir("/proc/self/fd"))

    list(run_jobs([1], grade, config=JobsConfig(num_workers=1)))  # multiprocessing's own helper
    backend = BubblewrapBackend()
    backend.collect_garbage()
    killer = Killer(4)
    before, own = state(), psutil.Process().memory_info().rss
    disk, memory = psutil.disk_usage("/tmp").used, psutil.virtual_memory().used
    outcomes = list(
        run_jobs(
            (number for number in range(2000)),
            grade,
            config=JobsConfig(num_workers=2, num_retries=20),
            clean_up=backend.collect_garbage,
            on_worker=killer.pids.append,
        )
    )
    killer.close()
    check(outcomes, 2000)
    assert [o.job for o in outcomes if o.infra_error] == [13]
    assert state() == before
    grown = psutil.Process().memory_info().rss - own
    print(
        f"{killer.num_kills} kills, {sum(o.num_attempts > 1 for o in outcomes)} jobs tried again; "
        f"this process {grown / 2**20:+.0f} MiB; the machine, others included: "
        f"disk {(psutil.disk_usage('/tmp').used - disk) / 2**20:+.1f} MiB, "
        f"memory {(psutil.virtual_memory().used - memory) / 2**20:+.0f} MiB"
    )
    assert grown < 64 << 20
