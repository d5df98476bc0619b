"""Version 2 where the kernel mounts it: entering, killing, counting. Its memory and process bounds
need those controllers, which a machine with version 1 beside it keeps there."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from m1.sandbox import cgroup
from m1.sandbox.cgroup import GroupV2


def mounted():
    lines = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    return next((Path(line[1]) for line in lines if line[2] == "cgroup2"), None)


def can_create():
    folder = mounted()
    return folder is not None and os.access(folder, os.W_OK) and os.geteuid() == 0


pytestmark = pytest.mark.skipif(not can_create(), reason="no writable cgroup2 here")


@pytest.fixture
def group(monkeypatch):
    monkeypatch.setenv("M1_CGROUP", str(mounted()))
    name = f"m1-sandbox-{os.getpid()}-v2test"
    folder = mounted() / name
    folder.mkdir()
    found = GroupV2.existing(name)
    yield found
    found.kill()
    found.remove()
    assert not folder.exists()


def start(group, program):
    entrances = [os.fsencode(path) for path in group.entrances]
    return subprocess.Popen(["sh", "-c", program], preexec_fn=lambda: cgroup.enter(entrances))


def test_killing_reaches_every_process_and_waits(group):
    process = start(group, "sleep 1000 & setsid sleep 1000 & (trap '' TERM; sleep 1000) & wait")
    listed = Path(group.entrances[0])
    deadline = time.monotonic() + 20
    while len(listed.read_text().split()) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    pids = listed.read_text().split()
    assert len(pids) == 4
    group.kill()
    process.wait()
    assert listed.read_text() == ""
    assert process.returncode == -9


def test_processor_time_counts_the_dead(group):
    start(group, "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done").wait()
    assert group.cpu_seconds() > 0.01


@pytest.mark.skipif(
    not can_create() or "memory" not in (mounted() / "cgroup.controllers").read_text(),
    reason="version 2 has no memory controller here",
)
def test_a_group_with_bounds_ends_what_exceeds_its_memory(monkeypatch):
    monkeypatch.setenv("M1_CGROUP", str(mounted()))
    bounded = GroupV2(f"m1-sandbox-{os.getpid()}-v2memory")
    try:
        bounded.bound(memory_mib=32, num_processes=8)
        process = start(bounded, "python3 -c 'x = bytearray(200 << 20)'")
        process.wait()
        assert process.returncode != 0
        assert bounded.was_out_of_memory()
    finally:
        bounded.kill()
        bounded.remove()
