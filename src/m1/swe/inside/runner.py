"""Runs a tree's tests inside a sandbox and reports what happened; no file of it lies there.

The host sends this text and a job over standard input (`m1.swe.suite`). Two processes: the
supervisor, which imports nothing of the tree and alone holds the channel to the host, prepares the
tree, keeps time and reads exit statuses from the kernel; and its child, which runs pytest. What the
child says is taken as what it is, the word of a process that runs code nobody trusts.
"""

import contextlib
import json
import os
import select
import signal
import time
from typing import Any

from m1.swe.inside.child import load_pytest, run_pytest
from m1.swe.inside.trees import apply_patch, prepare

_PR_SET_DUMPABLE = 4
_MAX_CHILD_BYTES = 32 << 20
_LOG_BYTES = 64 << 10
_MAX_ATTEMPTS = 4
_COLLECTING_SECONDS = 120.0


def main(job):
    """Prepare the tree, run the tests, print one JSON object."""
    channel = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    result: dict[str, Any] = {"patch": None, "tests": {}, "attempts": [], "log": "", "errors": []}
    os.chdir(job["tree"])
    child = _Child(job, frozenset())
    _set_dumpable(0)  # a child of the same user can neither trace us nor open our descriptors
    if job["patch"]:
        result["patch"] = apply_patch(job["patch"])
    if not job["patch"] or result["patch"]["is_applied"]:
        prepare(job)
        supervise(job, result, child)
    data = json.dumps(result).encode("utf-8", "backslashreplace")
    while data:
        data = data[os.write(channel, data) :]
    os._exit(0)  # taking the interpreter down would only take time


def supervise(job, result, child):
    """Run pytest until every test has a result; a test that kills or stalls it is passed by."""
    deadline = time.monotonic() + job["wall_seconds"]
    for _ in range(_MAX_ATTEMPTS):
        attempt = _attempt(job, result, deadline, child)
        result["attempts"].append(attempt)
        victim = attempt["interrupted"]
        if attempt["is_complete"] or victim is None or time.monotonic() > deadline:
            return
        if not attempt["stopped_by"] and attempt["status"] < 128:
            return  # left by itself: no crash, and a fresh process must not gain by it
        reason = "timeout" if attempt["stopped_by"] else "crash"
        result["tests"][victim]["outcome"] = reason
        done = [i for i, t in result["tests"].items() if t["outcome"] != "running"]
        child = _Child(job, frozenset(done))


class _Child:
    """A process that imports pytest at once, beside us, and meets the tree when it is told to."""

    def __init__(self, job, done):
        self.started = time.monotonic()
        self.report_in, report_out = os.pipe()
        self.log_in, log_out = os.pipe()
        told, self.tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(job, done, told, report_out, log_out)
        for descriptor in (told, report_out, log_out):
            os.close(descriptor)

    @staticmethod
    def _run(job, done, told, report_out, log_out):
        try:
            os.setsid()
            os.dup2(log_out, 1)
            os.dup2(log_out, 2)
            kept = os.dup2(report_out, 200, inheritable=False)
            told = os.dup2(told, 201, inheritable=False)
            os.closerange(3, 200)
            if done:
                _set_dumpable(1)  # a copy of the supervisor, which has closed itself by now
            load_pytest(job)
            word = os.read(told, 1)
            os.close(told)
            if word:
                run_pytest(job, kept, done)
        except BaseException as error:  # the supervisor must never go on in two processes
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(99)

    def let_go(self):
        """The tree is ready."""
        with contextlib.suppress(BrokenPipeError):  # it is dead, which its status says
            os.write(self.tell, b"1")
        os.close(self.tell)

    def kill(self):
        """With all that stayed in its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def _attempt(job, result, deadline, child):
    state = _State(result)
    log = bytearray()
    child.let_go()
    stopped_by = _listen(job, state, log, child.report_in, child.log_in, deadline)
    if stopped_by:
        child.kill()
    status = _wait(child.pid, 5.0)
    child.kill()
    os.close(child.report_in)
    os.close(child.log_in)
    result["log"] = (result["log"] + log.decode("utf-8", "replace"))[-_LOG_BYTES:]
    said = state.end or {}
    return {
        "status": status,
        "said_status": said.get("rc"),
        "is_complete": bool(state.end) and status == said.get("rc"),
        "changed": sorted({*state.seen, *map(str, said.get("changed", []))})[:50],
        "interrupted": state.running,
        "stopped_by": stopped_by,
        "seconds": time.monotonic() - child.started,
    }


class _State:
    """What the child has said so far."""

    def __init__(self, result):
        self.result, self.running, self.end, self.since = result, None, None, time.monotonic()
        self.seen = set()

    def take(self, line):
        """One record; nonsense is left out."""
        try:
            record = json.loads(line)
            kind = record["k"]
            handler = getattr(self, "on_" + kind, None)
            if handler is not None:
                handler(record)
        except (ValueError, KeyError, TypeError, AttributeError):
            self.result["errors"].append("the child sent what is no record")
            del self.result["errors"][20:]

    def on_start(self, record):
        self.running, self.since = str(record["id"]), time.monotonic()
        self.result["tests"][self.running] = {
            "outcome": "running", "proofs": [], "message": "", "seconds": 0.0, "passed": [],
        }  # fmt: skip

    def on_proof(self, record):
        if self.running is not None:
            test = self.result["tests"][self.running]
            if "call" not in test["passed"] and len(test["proofs"]) < 50:
                test["proofs"].append(str(record["secret"])[:64])

    def on_report(self, record):
        test = self.result["tests"].get(str(record["id"]))
        if test is None or self.running != str(record["id"]):
            return
        outcome = str(record["outcome"])
        if outcome == "passed":
            test["passed"].append(str(record["when"]))
        elif test["outcome"] in ("running", "skipped"):
            test["outcome"] = "skipped" if outcome == "skipped" else "failed"
            test["message"] = str(record.get("message", ""))[:4000]

    def on_finish(self, record):
        test = self.result["tests"].get(str(record["id"]))
        if test is None or self.running != str(record["id"]):
            return
        test["seconds"] = round(time.monotonic() - self.since, 4)
        if test["outcome"] == "running":
            is_whole = {"setup", "call", "teardown"} <= set(test["passed"])
            test["outcome"] = "passed" if is_whole else "failed"
        self.running, self.since = None, time.monotonic()

    def on_error(self, record):
        self.result["errors"].append(str(record["message"])[:4000])
        del self.result["errors"][20:]

    def on_seen(self, record):
        if len(self.seen) < 50:
            self.seen.add(str(record["what"])[:200])

    def on_end(self, record):
        self.end = record


def _listen(job, state, log, report_in, log_in, deadline):
    """Read records until the child closes its end; the reason when it must be killed."""
    buffer, total, is_open = b"", 0, True
    poller = select.poll()
    poller.register(report_in, select.POLLIN)
    poller.register(log_in, select.POLLIN)
    state.since = time.monotonic()
    while is_open:
        now = time.monotonic()
        seconds = job["test_seconds"]
        if state.running is None:  # starting, collecting
            seconds = max(seconds, _COLLECTING_SECONDS)
        limit = min(deadline, state.since + seconds)
        if now >= limit:
            return "wall" if now >= deadline else "test"
        for descriptor, _ in poller.poll(max(1, int((limit - now) * 1000))):
            data = os.read(descriptor, 1 << 16)
            if descriptor == log_in:
                if not data:
                    poller.unregister(log_in)
                log += data
                del log[:-_LOG_BYTES]
                continue
            total += len(data)
            if total > _MAX_CHILD_BYTES:
                return "flood"
            is_open = bool(data)
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                state.take(line)
            if state.end is not None:
                return None
    return None


def _wait(pid, seconds):
    """Exit status as a shell says it."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        if time.monotonic() > until:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            until = float("inf")
        time.sleep(0.002)


def _set_dumpable(value):
    import ctypes  # not on the way of the child, which the other process is

    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, value, 0, 0, 0)
