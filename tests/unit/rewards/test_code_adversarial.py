import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from adversarial_programs import FUNCTIONS, PROGRAMS

from m1.rewards.code.verifier import verify
from m1.rewards.service.pool import RewardService, ServiceConfig
from m1.sandbox import bubblewrap, cgroup, owner
from m1.types import Task

pytestmark = pytest.mark.skipif(
    bubblewrap.failure() is not None, reason=f"no sandbox here: {bubblewrap.failure()}"
)
COMMON = {"cpu_seconds": 1, "memory_mib": 256}
STDIN = {**COMMON, "tests": [{"input": "2 3\n", "output": "5\n"}]}
FUNCTION = {
    **COMMON,
    "kind": "function",
    "function": "add",
    "tests": [{"input": [2, 3], "output": 5}],
}


def judge(suite, source):
    task = Task("add", "tests", "Add two numbers.", json.dumps(suite), "code")
    return verify(task, f"```python\n{source}\n```")


@pytest.fixture(scope="module", autouse=True)
def own_folder():
    """A folder for temporary files that other test runs of this machine do not write into.

    Not pytest's, which only its owner may enter: bubblewrap binds from it as another user.
    """
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", None)
        yield


def left_behind():
    """What this process's sandboxes could leave: groups, folders, processes, open descriptors."""
    mine = f"m1-sandbox-{owner.tag()}-"
    groups = {
        p.name for c in ("memory", "pids") for p in Path("/sys/fs/cgroup", c).glob(f"{mine}*")
    }
    folders = set(Path(tempfile.gettempdir()).glob(f"{mine}*"))
    processes = {p.pid for p in psutil.process_iter() if mine in _groups_of(p.pid)}
    own = {child.pid for child in psutil.Process().children(recursive=True)}
    return groups, folders, processes | own, len(os.listdir("/proc/self/fd"))


def _groups_of(pid):
    try:
        return Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return ""


def extra(before):
    """What is there now and was not before."""
    now = left_behind()
    return [*(a - b for a, b in zip(now[:3], before[:3], strict=True)), max(0, now[3] - before[3])]


@pytest.fixture(scope="module")
def verdicts():
    before = left_behind()
    jobs = [(STDIN, s) for s in PROGRAMS.values()] + [(FUNCTION, s) for s in FUNCTIONS.values()]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda job: judge(*job), jobs))
    names = [*PROGRAMS, *(f"function: {name}" for name in FUNCTIONS)]
    return before, dict(zip(names, found, strict=True))


def test_there_are_at_least_40_adversarial_programs():
    assert len(PROGRAMS) + len(FUNCTIONS) >= 40


def test_no_adversarial_program_gets_a_reward(verdicts):
    rewarded = {name: v for name, v in verdicts[1].items() if v.accuracy or v.parts["pass_rate"]}
    assert not rewarded


def test_nothing_is_left_behind(verdicts):
    before, _ = verdicts
    deadline = time.monotonic() + 5
    while any(extra(before)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(extra(before))


def test_nothing_is_left_behind_by_the_workers_of_a_service():
    before = left_behind()
    names = ["fork bomb", "memory bomb", "sleep", "kills everything", "right answer then crash"]
    honest = "a, b = map(int, input().split())\nprint(a + b)"
    task = Task("add", "tests", "Add two numbers.", json.dumps(STDIN), "code")
    with RewardService(ServiceConfig(num_workers=2)) as service:
        jobs = [(task, PROGRAMS[name]) for name in names] + [(task, honest)]
        found = [j.verdict.accuracy for j in service.judge_all(jobs)]
    assert found == [0, 0, 0, 0, 0, 1]
    deadline = time.monotonic() + 5
    while any(extra(before)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(extra(before))


def test_the_sandbox_still_serves_honest_programs(verdicts):
    assert judge(STDIN, "a, b = map(int, input().split())\nprint(a + b)").accuracy == 1
    assert judge(FUNCTION, "def add(a, b): return a + b").accuracy == 1


def test_limits_are_named_as_reasons(verdicts):
    reasons = {name: verdict.reason.partition(":")[0] for name, verdict in verdicts[1].items()}
    assert reasons["sleep"] == "limit_wall"
    assert reasons["endless output without newline"] == "limit_output"
    assert reasons["right answer then exit code"] == "runtime_error"
    if cgroup.version():
        assert reasons["memory bomb"] == "limit_memory"
