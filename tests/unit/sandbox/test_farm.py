import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sandbox_limits import LIMITS

from m1.sandbox import bubblewrap
from m1.sandbox.base import SandboxError, SandboxGone
from m1.sandbox.farm.leasing import Farm, FarmConfig, FarmFull
from m1.sandbox.local import BubblewrapBackend

pytestmark = pytest.mark.skipif(
    bubblewrap.failure() is not None, reason=f"no sandbox here: {bubblewrap.failure()}"
)
OPENER = """
import sys, time
from m1.sandbox.local import BubblewrapBackend
box = BubblewrapBackend().open()
print(box.name, flush=True)
box.exec(["sh", "-c", "echo running; sleep 600"], on_output=lambda _, data: print("on", flush=True))
"""


@pytest.fixture
def make_farm():
    farms = []

    def make(**sizes):
        farms.append(Farm(BubblewrapBackend(), FarmConfig(**sizes)))
        return farms[-1]

    yield make
    for farm in farms:
        farm.close()


def until(test, seconds=20):
    deadline = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_prometheus_reads_the_numbers_of_an_open_farm(make_farm):
    farm = make_farm(max_sandboxes=1, metrics_port=0)
    with farm.lease(limits=LIMITS) as sandbox:
        sandbox.exec(["true"])
        page = f"http://127.0.0.1:{farm.metrics_port}/metrics"
        text = urllib.request.urlopen(page, timeout=10).read().decode()
    assert 'm1_sandbox_leased{backend="bubblewrap"} 1.0' in text
    assert 'm1_sandbox_exec_seconds_count{backend="bubblewrap"} 1.0' in text
    with pytest.raises(SandboxError, match=f"served at port {farm.metrics_port}"):
        make_farm(metrics_port=farm.metrics_port)
    farm.close()
    with pytest.raises(OSError):
        urllib.request.urlopen(page, timeout=10)


def test_never_more_sandboxes_are_open_than_allowed(make_farm):
    farm = make_farm(max_sandboxes=2)
    lock, counts = threading.Lock(), []
    num_open = 0

    def episode(_):
        nonlocal num_open
        with farm.lease(limits=LIMITS) as sandbox:
            with lock:
                num_open += 1
                counts.append(num_open)
            assert sandbox.exec(["true"]).exit_code == 0
            with lock:
                num_open -= 1

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(episode, range(10)))
    assert max(counts) == 2
    assert farm.metrics.value("m1_sandbox_exec_seconds_count") == 10
    assert farm.metrics.value("m1_sandbox_queue_seconds_count") == 10
    assert farm.metrics.value("m1_sandbox_leased") == 0


def test_callers_are_served_in_the_order_they_came(make_farm):
    farm = make_farm(max_sandboxes=1)
    held = farm.lease(limits=LIMITS)
    served = []

    def take(number):
        with farm.lease(limits=LIMITS):
            served.append(number)

    threads = []
    for number in range(4):
        threads.append(threading.Thread(target=take, args=(number,)))
        threads[-1].start()
        until(lambda n=number: farm.metrics.value("m1_sandbox_waiting") == n + 1)
    held.close()
    for thread in threads:
        thread.join()
    assert served == [0, 1, 2, 3]


def test_a_full_queue_refuses_at_once_and_a_patient_caller_in_time(make_farm):
    farm = make_farm(max_sandboxes=1, max_waiting=1)
    with farm.lease(limits=LIMITS):
        thread = threading.Thread(target=lambda: farm.lease(limits=LIMITS).close())
        thread.start()
        until(lambda: farm.metrics.value("m1_sandbox_waiting") == 1)
        with pytest.raises(FarmFull, match="max_waiting 1"):
            farm.lease(limits=LIMITS)
    thread.join()
    with farm.lease(limits=LIMITS), pytest.raises(FarmFull, match=r"no room within 0\.1 s"):
        farm.lease(limits=LIMITS, timeout_seconds=0.1)
    assert farm.metrics.value("m1_sandbox_failures_total", kind="full") == 2


def test_no_command_outlives_its_lease(make_farm):
    farm = make_farm(max_sandboxes=1)
    held = farm.lease(limits=LIMITS, seconds=1.5)
    started = time.monotonic()
    with pytest.raises(SandboxGone, match="ran out"):
        held.exec(["sleep", "60"])
    assert time.monotonic() - started < 10
    with pytest.raises(SandboxGone, match="ran out"):
        held.exec(["true"])
    farm.lease(limits=LIMITS, timeout_seconds=5).close()


def test_a_holder_that_hangs_loses_its_sandbox(make_farm):
    farm = make_farm(max_sandboxes=1)
    held = farm.lease(limits=LIMITS, seconds=0.5)
    until(lambda: not Path("/tmp", held.name).exists())
    assert farm.metrics.value("m1_sandbox_failures_total", kind="expired") == 1
    farm.lease(limits=LIMITS, timeout_seconds=5).close()


def test_a_lease_can_be_renewed(make_farm):
    farm = make_farm(max_sandboxes=1)
    with farm.lease(limits=LIMITS, seconds=1) as held:
        held.renew(60)
        time.sleep(1.6)
        assert held.exec(["true"]).exit_code == 0


def test_a_warm_sandbox_is_fresh_and_used_once(make_farm):
    farm = make_farm(max_sandboxes=2, num_warm=2)
    names = set()
    with farm.lease(limits=LIMITS) as first:
        names.add(first.name)
        first.write_file("/tmp/mark", b"1")
    until(lambda: farm.metrics.value("m1_sandbox_warm") == 2)
    for _ in range(3):
        with farm.lease(limits=LIMITS) as sandbox:
            assert sandbox.exec(["cat", "/tmp/mark"]).exit_code == 1
            sandbox.write_file("/tmp/mark", b"1")
            names.add(sandbox.name)
    assert len(names) == 4


def test_limits_met_are_counted_by_name(make_farm):
    farm = make_farm()
    with farm.lease(limits=LIMITS) as sandbox:
        sandbox.exec(["sh", "-c", "yes"])
    assert farm.metrics.value("m1_sandbox_failures_total", kind="limit_output") == 1


def test_a_closed_farm_leaves_nothing_and_refuses(make_farm):
    farm = make_farm(num_warm=1)
    names = [farm.lease(limits=LIMITS).name for _ in range(2)]
    farm.close()
    assert not any(Path("/tmp", name).exists() for name in names)
    with pytest.raises(SandboxError, match="closed"):
        farm.lease()


def test_what_a_killed_owner_left_is_collected():
    backend = BubblewrapBackend()
    owner = subprocess.Popen([sys.executable, "-c", OPENER], stdout=subprocess.PIPE, text=True)
    name = owner.stdout.readline().strip()
    folder = Path("/tmp", name)
    assert owner.stdout.readline() == "on\n"
    assert _processes(name)
    backend.collect_garbage()
    assert folder.exists()  # its owner lives
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    until(lambda: not _processes(name))  # they die with their owner, not by the collection
    assert backend.collect_garbage() >= 1
    assert not folder.exists()
    assert name not in Path("/proc/self/mounts").read_text()


def _processes(name):
    """Processes that show the sandbox's folder in their arguments: bubblewrap's."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and int(path.name) != os.getpid():
            try:
                if name.encode() in (path / "cmdline").read_bytes():
                    found.append(path.name)
            except OSError:
                continue
    return found
