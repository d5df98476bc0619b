import contextlib
import json
import os
import subprocess
import sys
import time
from random import Random

import psutil
import pytest

from m1.rewards.service.pool import RewardService, ServiceConfig
from m1.rewards.service.queues import FairQueue
from m1.types import M1Error, Task

OWN = {
    kind: {"module": "misbehaving_verifier", "timeout_seconds": 0.4, "memory_mib": 256}
    for kind in ("mine", "other")
}
VERDICTS = {"right": (1, "compared"), "wrong": (0, "compared"), "hang": (0, "timeout"),
            "memory": (0, "memory"), "recurse": (0, "recursion")}  # fmt: skip
FAILURES = {"sleep": "worker_stalled", "sleep deaf": "worker_stalled", "crash": "worker_crashed",
            "segfault": "worker_crashed", "exit": "worker_crashed",
            "raise": "verifier_error: ValueError: the verifier is broken"}  # fmt: skip


STARVED = ("worker_stalled", "worker_starved")


def task(kind="mine", **metadata):
    return Task("t", "s", "q", "right", kind, metadata)


@pytest.fixture(scope="module", autouse=True)
def own_verifiers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("M1_VERIFIERS", json.dumps(OWN))
        yield


@pytest.fixture
def service(own_verifiers):
    with RewardService(ServiceConfig(num_workers=2, cache_entries=0)) as running:
        running.judge(task(), "right")
        yield running


def children():
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.mark.parametrize("completion", VERDICTS)
def test_an_answer_gets_its_verdict_even_when_it_exhausts_the_verifier(own_verifiers, completion):
    # Filling the memory takes time too, on busy cores more than 0.4 s.
    config = ServiceConfig(num_workers=1, timeout_scale=1 if completion == "hang" else 50)
    with RewardService(config) as service:
        judgement = service.judge(task(), completion)
    assert judgement.infra_error is None
    assert (judgement.verdict.accuracy, judgement.verdict.reason) == VERDICTS[completion]


@pytest.mark.parametrize("completion", FAILURES)
def test_a_failure_of_the_verifier_is_named_and_no_verdict(service, completion):
    judgement = service.judge(task(), completion)
    assert judgement.verdict is None
    assert judgement.infra_error == FAILURES[completion]
    assert judgement.num_attempts == (1 if completion == "raise" else 2)


def test_the_service_goes_on_after_every_misbehaviour(service):
    jobs = [(task(), text) for text in (*FAILURES, *VERDICTS, "leave a child")]
    list(service.judge_all(jobs))
    assert service.judge(task(), "right").verdict.accuracy == 1


def test_nothing_is_left_after_close(own_verifiers):
    before, descriptors = children(), len(os.listdir("/proc/self/fd"))
    with RewardService(ServiceConfig(num_workers=2)) as service:
        list(service.judge_all((task(), t) for t in ("hang", "leave a child", "crash", "right")))
        sleepers = [
            p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "1000"]
        ]
        assert not sleepers
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_judgements_come_in_the_order_of_the_jobs(service):
    rng = Random(1)
    texts = [rng.choice(["right", "wrong"]) for _ in range(300)]
    jobs = [(task(seconds=rng.choice([0, 0, 0.01])), text) for text in texts]
    found = [judgement.verdict.accuracy for judgement in service.judge_all(jobs)]
    assert found == [float(text == "right") for text in texts]


def test_equal_content_is_judged_once(own_verifiers):
    with RewardService(ServiceConfig(num_workers=1)) as service:
        first = service.judge(task(), "right")
        second = service.judge(task(), "right")
        other = service.judge(task(hint=1), "right")
    assert [first.is_cached, second.is_cached, other.is_cached] == [False, True, False]
    assert first.verdict == second.verdict


def test_infrastructure_errors_are_not_remembered(own_verifiers):
    with RewardService(ServiceConfig(num_workers=1, num_retries=0)) as service:
        assert not any(service.judge(task(), "crash").is_cached for _ in range(2))


def test_one_bad_verifier_does_not_starve_the_others(service):
    bad = [service.submit(task("other"), "hang") for _ in range(30)]
    started = time.monotonic()
    assert all(
        j.verdict.accuracy for j in service.judge_all((task(n=i), "right") for i in range(20))
    )
    waited = time.monotonic() - started
    assert sum(not future.done() for future in bad) > 5
    assert waited < 30 * OWN["other"]["timeout_seconds"] / 2


def test_text_that_is_no_unicode_is_judged(service):
    assert service.judge(task(), "\ud800\x00").verdict.accuracy == 0


def test_an_unknown_verifier_is_refused_before_it_is_queued(service):
    with pytest.raises(M1Error, match="'nobody:x' is not known; known: code, instructions"):
        service.submit(task("nobody:x"), "a")


def test_a_dead_nursery_is_replaced(service):
    service._nursery._process.kill()
    assert service.judge(task(), "right").verdict.accuracy == 1
    assert all(j.verdict for j in service.judge_all((task(n=i), "right") for i in range(9)))


def test_metrics_count_what_happened(own_verifiers):
    with RewardService(ServiceConfig(num_workers=1)) as service:
        list(service.judge_all((task(), text) for text in ("right", "hang", "crash", "right")))
        metrics = service.metrics()
    assert metrics["rewards/mine/jobs"] == 4
    assert metrics["rewards/mine/timeouts"] == 1
    assert metrics["rewards/mine/crashes"] == 2
    assert metrics["rewards/mine/infra_errors"] == 1
    assert metrics["rewards/mine/waiting"] == 0


def test_a_closed_service_fails_what_waits(own_verifiers):
    service = RewardService(ServiceConfig(num_workers=1))
    futures = [service.submit(task(n=i), "hang") for i in range(4)]
    service.close()
    assert futures[-1].result().infra_error == "service_closed"


def test_a_troubled_kind_keeps_half_of_the_workers_while_others_wait():
    queue = FairQueue(num_workers=4, max_waiting=99)
    for _ in range(9):
        queue.put("bad", "job")
    for _ in range(6):
        queue.done(queue.take()[0], was_trouble=True)
    held = [queue.take()[0] for _ in range(2)]
    queue.put("good", "job")
    assert held == ["bad", "bad"]
    assert queue.take()[0] == "good"


@contextlib.contextmanager
def crowded(num_spinners):
    """A service whose worker shares one processor with busy processes, each of its own session."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    config = ServiceConfig(num_workers=1, num_retries=0, cache_entries=0, timeout_scale=3)
    spin = [sys.executable, "-ISc", "while True: pass"]
    spinners = []
    try:
        with RewardService(config) as running:
            running.judge(task(), "right")
            spinners = [subprocess.Popen(spin, start_new_session=True) for _ in range(num_spinners)]
            yield running
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
        os.sched_setaffinity(0, allowed)


def test_busy_neighbours_do_not_lengthen_a_verdict(own_verifiers):
    budget = 3 * OWN["mine"]["timeout_seconds"]
    with crowded(3) as service:
        judgement = service.judge(task(), "hang")
        idle = service.judge(task(), "sleep")
    assert judgement.verdict is not None or judgement.infra_error == "worker_starved"
    assert budget <= judgement.seconds < budget + 3
    assert idle.infra_error == "worker_stalled"


def test_a_worker_without_a_processor_gives_no_verdict(own_verifiers):
    with crowded(25) as service:
        judgement = service.judge(task(), "hang")
    assert judgement.infra_error == "worker_starved"


def mixed(num_jobs):
    """5% of jobs that hang, crash or exhaust memory, and the judgement each must get."""
    rng = Random(7)
    bad = ["hang", "sleep", "crash", "memory", "segfault", "exit"]
    for number in range(num_jobs):
        text = rng.choice(bad) if rng.random() < 0.05 else rng.choice(["right", "wrong"])
        yield task(rng.choice(["mine", "other"]), n=number), text


def check_mixed(num_jobs):
    before, descriptors, num_starved = children(), len(os.listdir("/proc/self/fd")), 0
    with RewardService(ServiceConfig(num_workers=2)) as service:
        for (_, text), judgement in zip(
            mixed(num_jobs), service.judge_all(mixed(num_jobs)), strict=True
        ):
            if (
                text not in FAILURES and judgement.infra_error in STARVED
            ):  # busy neighbours can starve any worker
                num_starved += text in VERDICTS
            elif text in VERDICTS:
                assert judgement.verdict is not None, (text, judgement)
                accuracy, reason = VERDICTS[text]
                assert judgement.verdict.accuracy == accuracy
                # Filling the memory takes time too, on busy cores more than it has.
                assert judgement.verdict.reason in (reason, "timeout" if text == "memory" else "")
            else:
                assert judgement.infra_error == FAILURES[text]
    assert num_starved <= 0.03 * num_jobs
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_600_mixed_jobs_all_get_a_verdict_or_a_named_error():
    check_mixed(600)


@pytest.mark.exhaustive
def test_10000_mixed_jobs_all_get_a_verdict_or_a_named_error():
    check_mixed(10_000)
