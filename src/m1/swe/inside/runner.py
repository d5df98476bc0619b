"""Runs a tree's tests inside a sandbox and reports what happened; no file of it lies there.

The host sends this text and a job over standard input (`m1.swe.suite`). Two processes: the
supervisor, which imports nothing of the tree and alone holds the channel to the host, prepares the
tree, keeps time and reads exit statuses from the kernel; and its child, which runs pytest. What the
child says is taken as what it is, the word of a process that runs code nobody trusts.
"""

import base64
import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import types

_PR_SET_DUMPABLE = 4
_MAX_CHILD_BYTES = 32 << 20
_LOG_BYTES = 64 << 10
_MAX_ATTEMPTS = 4
_CHANGED_BY_PYTEST = frozenset({"_pytest.config.Config._getini_unknown_type"})  # its legacypath
TEST_FOLDERS = frozenset({"test", "tests"})
STEERING = frozenset(
    {
        "conftest.py", "sitecustomize.py", "usercustomize.py", "pytest.ini", ".pytest.ini",
        "pytest.toml", ".pytest.toml", "tox.ini", "setup.cfg", "pyproject.toml", "PKG-INFO",
    }
)  # fmt: skip


def main(job):
    """Prepare the tree, run the tests, print one JSON object."""
    channel = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    _set_dumpable(0)  # a child of the same user can neither trace us nor open our descriptors
    result = {"patch": None, "tests": {}, "attempts": [], "log": "", "errors": []}
    os.chdir(job["tree"])
    if job["patch"]:
        result["patch"] = apply_patch(job["patch"])
    if not job["patch"] or result["patch"]["is_applied"]:
        prepare(job)
        supervise(job, result)
    data = json.dumps(result).encode("utf-8", "backslashreplace")
    while data:
        data = data[os.write(channel, data) :]


def apply_patch(patch):
    """Apply a unified diff with git; nothing of the tree runs."""
    variables = {
        "PATH": "/usr/bin:/bin",
        "HOME": "/nonexistent",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        "GIT_CEILING_DIRECTORIES": os.path.dirname(os.getcwd()),
    }
    error = ""
    for options in ([], ["--recount"]):
        command = ["git", "-c", "safe.directory=*", "apply", "--whitespace=nowarn", *options, "-"]
        try:
            done = subprocess.run(
                command,
                input=patch.encode("utf-8", "surrogateescape"),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=variables,
                check=False,
            )
        except OSError as problem:
            return {"is_applied": False, "error": "git: %s" % problem, "is_ours": True}
        if done.returncode == 0:
            return {"is_applied": True, "error": ""}
        error = error or done.stderr.decode("utf-8", "replace")[-2000:]
    return {"is_applied": False, "error": error}


def prepare(job):
    """Remove what could steer the tests, then put the tests of grading in place."""
    for folder, names, files in os.walk("."):
        names[:] = [n for n in names if n != ".git"]
        for name in [n for n in names if n == "__pycache__" or os.path.islink(_join(folder, n))]:
            _remove(_join(folder, name))
            names.remove(name)
        for name in files:
            path = _join(folder, name)
            if is_test(path) or steers(path, job["python_path"], job["site"]):
                _remove(path)
    for path, (data, is_executable) in job["write"].items():
        _remove(path)
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))
        os.chmod(path, 0o755 if is_executable else 0o644)


def _join(folder, name):
    return os.path.normpath(os.path.join(folder, name))


def is_test(path):
    """Whether a file of a tree belongs to its tests."""
    *folders, name = path.split("/")
    if TEST_FOLDERS.intersection(folders) or name == "conftest.py":
        return True
    stem, ending = os.path.splitext(name)
    return ending == ".py" and (stem.startswith("test_") or stem.endswith("_test") or stem == "tests")


def steers(path, python_path, site):
    """Whether a file can change how tests run without being one of them.

    Settings of pytest, hooks of the interpreter and of installed packages, compiled modules, and
    modules that would stand before those of the standard library or the runner.
    """
    parts = path.split("/")
    name = parts[-1]
    if name in STEERING or name.endswith((".pth", ".pyc", ".so", ".pyd", ".egg-link")):
        return True
    if any(part.endswith((".egg-info", ".dist-info")) for part in parts):
        return True
    for root in {"", *("" if r == "." else r for r in python_path)}:
        if root and not path.startswith(root + "/"):
            continue
        rest = path[len(root) + 1 :] if root else path
        top, _, below = rest.partition("/")
        module = top if below else top[: -len(".py")] if top.endswith(".py") else None
        if module is not None and (
            module in sys.stdlib_module_names
            or os.path.exists(os.path.join(site, module))
            or os.path.exists(os.path.join(site, module + ".py"))
        ):
            return True
    return os.path.islink(path)


def _remove(path):
    with contextlib.suppress(OSError):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)


# The supervisor


def supervise(job, result):
    """Run pytest until every test has a result; a test that kills or stalls it is passed by."""
    deadline = time.monotonic() + job["wall_seconds"]
    for _ in range(_MAX_ATTEMPTS):
        attempt = _attempt(job, result, deadline)
        result["attempts"].append(attempt)
        victim = attempt["interrupted"]
        if attempt["is_complete"] or victim is None or time.monotonic() > deadline:
            return
        reason = "timeout" if attempt["stopped_by"] else "crash"
        result["tests"][victim]["outcome"] = reason


def _attempt(job, result, deadline):
    report_in, report_out = os.pipe()
    log_in, log_out = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            os.dup2(log_out, 1)
            os.dup2(log_out, 2)
            kept = os.dup2(report_out, 200, inheritable=False)
            os.closerange(3, 200)
            _set_dumpable(1)
            done = [i for i, t in result["tests"].items() if t["outcome"] != "running"]
            run_pytest(job, kept, set(done))
        except BaseException as error:  # the supervisor must never go on in two processes
            os.write(2, ("%s: %s\n" % (type(error).__name__, error)).encode())
        finally:
            os._exit(99)
    os.close(report_out)
    os.close(log_out)
    state = _State(result)
    log = bytearray()
    stopped_by = _listen(job, state, log, report_in, log_in, deadline)
    if stopped_by:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    status = _wait(pid, 5.0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.close(report_in)
    os.close(log_in)
    result["log"] = (result["log"] + log.decode("utf-8", "replace"))[-_LOG_BYTES:]
    said = state.end or {}
    return {
        "status": status,
        "said_status": said.get("rc"),
        "is_complete": bool(state.end) and status == said.get("rc"),
        "changed": sorted({*state.seen, *map(str, said.get("changed", []))})[:50],
        "interrupted": state.running,
        "stopped_by": stopped_by,
        "seconds": time.monotonic() - started,
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
        self.running = None

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
        limit = min(deadline, state.since + job["test_seconds"])
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
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, value, 0, 0, 0)


# The child


def run_pytest(job, descriptor, done):
    """Run pytest on the job's files, without tests that have a result; never returns."""
    paths = [os.path.abspath(p) for p in job["python_path"]]
    sys.path[:] = [*sys.path, job["site"], *paths]
    os.environ["PYTHONPATH"] = os.pathsep.join([job["site"], *paths])
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.dont_write_bytecode = True
    import builtins
    import site
    import unittest.mock

    import pytest

    site.setquit()
    if job["clock"] is not None:
        import time_machine

        time_machine.travel(job["clock"], tick=True).start()
    write, dumps, leave = os.write, json.dumps, os._exit

    def send(**record):
        data = dumps(record).encode("utf-8", "backslashreplace") + b"\n"
        while data:
            data = data[write(descriptor, data) :]

    setattr(builtins, job["function"], lambda secret: send(k="proof", secret=secret))
    changes = watch(builtins)
    sys.addaudithook(sentry(job, send))
    arguments = [
        *("-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "required_plugins="),
        *("--continue-on-collection-errors", "--assert=plain", "--rootdir", os.getcwd()),
        *(part for plugin in job["plugins"] for part in ("-p", plugin)),
        *job["files"],
    ]
    only = set(job["only"]) if job["only"] is not None else None
    code = int(pytest.main(arguments, plugins=[reporter(pytest, send, changes, only, done)]))
    changes.look()
    send(k="end", rc=code, changed=sorted(changes.found))
    leave(code)


def reporter(pytest, send, changes, only, done):
    """A plugin that tells the supervisor what pytest sees."""

    class Reporter:
        @pytest.hookimpl(trylast=True)
        def pytest_collection_modifyitems(self, config, items):
            dropped = [i for i in items if i.nodeid in done or (only and i.nodeid not in only)]
            if dropped:
                config.hook.pytest_deselected(items=dropped)
                gone = set(map(id, dropped))
                items[:] = [i for i in items if id(i) not in gone]

        def pytest_collectreport(self, report):
            if report.failed:
                send(k="error", message="%s: %s" % (report.nodeid, _text(report)))

        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_logstart(self, nodeid, location):
            send(k="start", id=nodeid)

        def pytest_runtest_logreport(self, report):
            outcome = report.outcome
            message = _text(report) if outcome != "passed" else ""
            send(k="report", id=report.nodeid, when=report.when, outcome=outcome, message=message)

        @pytest.hookimpl(trylast=True)
        def pytest_runtest_logfinish(self, nodeid, location):
            changes.look()
            send(k="finish", id=nodeid)

    return Reporter()


def _text(report):
    text = str(report.longrepr or "")
    return text if len(text) <= 4000 else text[:1500] + "\n...\n" + text[-2500:]


_PEEKING = frozenset(
    {
        "sys._getframe", "sys._current_frames", "gc.get_objects", "gc.get_referrers",
        "gc.get_referents", "sys.settrace", "sys.setprofile", "code.__new__", "os.kill", "os.killpg",
        "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system",
        "subprocess.Popen", "pty.spawn", "ctypes.dlopen", "ctypes.dlsym", "ctypes.cdata",
    }
)  # fmt: skip
"""What a process does that reads or forges its own report, by the interpreter's audit events."""


def sentry(job, send):
    """An audit hook, which nothing can remove: tells when code under test looks at the tests.

    The secrets of `proofs` lie in test files and in their functions' constants, and the way to the
    supervisor in frames above. Whoever goes there is named by event and file. What the gold
    solution does itself is allowed (`Environment.allowed_changes`).
    """
    tests = frozenset(os.path.abspath(p) for p in job["write"] if is_test(p) and p.endswith(".py"))
    own = frozenset({__file__, "<string>"})
    trusted = (os.path.dirname(os.__file__) + os.sep, job["site"] + os.sep, "<frozen ")
    tree = job["tree"] + os.sep
    frame_of, real, join, getcwd = sys._getframe, os.path.realpath, os.path.join, os.getcwd
    text, decode = str, os.fsdecode
    busy = [False]

    def path_of(thing):
        if isinstance(thing, (bytes, text)):
            return real(join(getcwd(), decode(thing)))
        return ""

    def culprit(frame):
        while frame is not None:
            name = frame.f_code.co_filename
            if name in tests or name in own:
                return None
            if not name.startswith(trusted):
                return name[len(tree) :] if name.startswith(tree) else name
            frame = frame.f_back
        return "a thread"

    def hook(event, arguments):
        if busy[0]:
            return
        is_reading = event == "open" or event == "compile"
        is_code = event == "object.__getattr__" and arguments[1] == "__code__"
        if not (is_reading or is_code or event in _PEEKING):
            return
        busy[0] = True
        try:
            if is_reading and path_of(arguments[event == "compile"]) not in tests:
                return
            who = culprit(frame_of(1))
            if who is not None:
                send(k="seen", what="%s by %s" % (event, who))
        finally:
            busy[0] = False

    return hook


def _code(thing):
    """The code of a function or method; None for anything else."""
    inner = thing.__func__ if isinstance(thing, (staticmethod, classmethod)) else thing
    return inner.__code__ if isinstance(inner, types.FunctionType) else None


class watch:  # noqa: N801
    """Whether functions of pytest, unittest and builtins are still what they were at first."""

    def __init__(self, builtins):
        self.found = set()
        self.kept = []
        for name, thing in vars(builtins).items():
            self.kept.append(("builtins." + name, builtins, name, thing, _code(thing)))
        tops = ("pytest", "_pytest", "pluggy", "unittest")
        for label, module in sorted(sys.modules.items()):
            if label.split(".")[0] in tops and module is not None:
                self._keep(label, module, label)

    def _keep(self, label, owner, module):
        for name, thing in list(vars(owner).items()):
            code = _code(thing)
            if code is not None or isinstance(thing, property):
                self.kept.append((label + "." + name, owner, name, thing, code))
            elif isinstance(thing, type) and thing.__module__ == module and owner is not thing:
                self.kept.append((label + "." + name, owner, name, thing, _code(thing)))
                if not isinstance(owner, type):
                    self._keep(label + "." + name, thing, module)

    def look(self):
        """Compare once more."""
        for label, owner, name, thing, code in self.kept:
            now = vars(owner).get(name)
            if (now is not thing or _code(now) is not code) and label not in _CHANGED_BY_PYTEST:
                self.found.add(label)
