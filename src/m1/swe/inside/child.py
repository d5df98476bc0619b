"""pytest in a process of its own, beside code that nobody trusts, and what watches that code."""

import collections
import contextlib
import gc
import json
import os
import sys
import time
import types
from operator import is_

from m1.swe.inside.trees import is_test

_CHANGED_BY_PYTEST = frozenset({"_pytest.config.Config._getini_unknown_type"})  # its legacypath


def load_pytest(job):
    """Import what pytest needs, while the tree is not yet to be seen."""
    gc.disable()  # nothing of this is garbage, and looking takes a tenth of the time
    sys.path[:] = [*sys.path, job["site"]]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.dont_write_bytecode = True
    import site
    import unittest  # noqa: F401  loaded before the tree's code, so that `watch` knows it

    import pytest  # noqa: F401

    if job["clock"] is not None:
        import time_machine  # noqa: F401
    site.setquit()
    gc.freeze()
    gc.enable()


def run_pytest(job, descriptor, done):
    """Run pytest on the job's files, without tests that have a result; never returns."""
    import builtins

    import pytest

    paths = [os.path.abspath(p) for p in job["python_path"]]
    sys.path[:] = [*sys.path, *paths]
    os.environ["PYTHONPATH"] = os.pathsep.join([job["site"], *paths])
    for name in [n for n in sys.modules if n == "m1" or n.startswith("m1.")]:
        del sys.modules[name]  # ours: no test finds them by name
    if job["clock"] is not None:
        import time_machine

        time_machine.travel(job["clock"], tick=True).start()
    leave, (keep, send) = os._exit, _channel(descriptor)
    setattr(builtins, job["function"], lambda secret: keep(k="proof", secret=secret))
    changes = watch(builtins)
    sys.addaudithook(sentry(job, send))
    arguments = [
        *("-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "required_plugins="),
        *("--continue-on-collection-errors", "--rootdir", os.getcwd()),
        "--assert=" + job["assertions"],
        *(part for plugin in job["plugins"] for part in ("-p", plugin)),
        *job["files"],
    ]
    only = set(job["only"]) if job["only"] is not None else None
    tell = reporter(pytest, keep, send, changes, only, done)
    code = int(pytest.main(arguments, plugins=[tell]))
    changes.look()
    send(k="end", rc=code, changed=sorted(changes.found))
    leave(code)


def _channel(descriptor):
    """To keep a record for later, and to send one after all that were kept, in one write."""
    write, dumps = os.write, json.dumps
    kept: collections.deque[str] = collections.deque()
    add, take = kept.append, kept.popleft

    def keep(**record):
        add(dumps(record))

    def send(**record):
        add(dumps(record))
        texts = []
        with contextlib.suppress(IndexError):  # threads may be at it too
            while True:
                texts.append(take() + "\n")
        data = "".join(texts).encode("utf-8", "backslashreplace")
        while data:
            data = data[write(descriptor, data) :]

    return keep, send


def reporter(pytest, keep, send, changes, only, done):
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
                send(k="error", message=f"{report.nodeid}: {_text(report)}")

        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_logstart(self, nodeid, location):
            send(k="start", id=nodeid)

        def pytest_runtest_logreport(self, report):
            outcome = report.outcome
            if outcome != "failed" and hasattr(report, "context"):
                return  # of a subtest: the test itself still goes on
            message = _text(report) if outcome != "passed" else ""
            keep(k="report", id=report.nodeid, when=report.when, outcome=outcome, message=message)

        @pytest.hookimpl(trylast=True)
        def pytest_runtest_logfinish(self, nodeid, location):
            changes.look_again()
            keep(k="finish", id=nodeid)

        @pytest.hookimpl(tryfirst=True)
        def pytest_sessionfinish(self, session):
            send(k="last")  # what comes now is no test's

    return Reporter()


def _text(report):
    text = str(report.longrepr or "")
    return text if len(text) <= 4000 else text[:1500] + "\n...\n" + text[-2500:]


_PEEKING = frozenset(
    {
        "sys._getframe", "sys._current_frames", "gc.get_objects", "gc.get_referrers",
        "gc.get_referents", "sys.settrace", "sys.setprofile", "code.__new__", "os.kill",
        "os.killpg", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn",
        "os.system",
        "subprocess.Popen", "pty.spawn", "ctypes.dlopen", "ctypes.dlsym", "ctypes.cdata",
    }
)  # fmt: skip
"""What a process does that reads or forges its own report, by the interpreter's audit events."""


_DIRECT = frozenset({"sys._getframe", "object.__getattr__", "code.__new__"})
"""Those of them that count only when the tree's code does them itself: libraries do them too."""


_ATTRIBUTES = frozenset({"object.__getattr__", "object.__setattr__"})


_HEARD = frozenset({"open", "compile"}) | _ATTRIBUTES | _PEEKING


def sentry(job, send):
    """An audit hook, which nothing can remove: tells when code under test looks at the tests.

    The secrets of `proofs` lie in test files and in their functions' constants, and the way to the
    supervisor in frames above. Whoever goes there is named by event and file. What the gold
    solution does itself is allowed (`Environment.allowed_changes`).
    """
    tests = frozenset(os.path.abspath(p) for p in job["write"] if is_test(p) and p.endswith(".py"))
    own = frozenset({__file__})
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
        if event not in _HEARD or busy[0]:
            return
        is_reading = event == "open" or event == "compile"
        is_code = event in _ATTRIBUTES and arguments[1] == "__code__"
        if not (is_reading or is_code or event in _PEEKING):
            return
        busy[0] = True
        try:
            if is_reading and path_of(arguments[event == "compile"]) not in tests:
                return
            caller = frame_of(1)
            name = caller.f_code.co_filename
            if event in _DIRECT and name.startswith(trusted) and not name.endswith("/inspect.py"):
                return  # namedtuple, logging and their like
            who = culprit(caller)
            if who is not None:
                send(k="seen", what=f"{event} by {who}")
        finally:
            busy[0] = False

    return hook


class watch:
    """Whether functions of pytest, unittest and builtins are still what they were at first.

    Their code cannot be exchanged unseen either: `sentry` hears of it. Looking at it here too
    would take as long as the tests of a small package.
    """

    every_seconds = 0.01
    """Between looks, each of which takes a fortieth of it."""

    def __init__(self, builtins):
        self.found = set()
        self.kept = []
        self.all, self.map, self.is_ = builtins.all, builtins.map, is_  # as they are now
        self.clock, self.last = time.perf_counter, 0.0
        self._add("builtins.", vars(builtins), list(vars(builtins).items()))
        tops = ("pytest", "_pytest", "pluggy", "unittest")
        for label, module in sorted(sys.modules.items()):
            if label.split(".")[0] in tops and module is not None:
                self._keep(label, module, label)

    def _keep(self, label, owner, module):
        known = []
        for name, thing in list(vars(owner).items()):
            inner = thing.__func__ if isinstance(thing, (staticmethod, classmethod)) else thing
            if isinstance(inner, (types.FunctionType, property)):
                known.append((name, thing))
            elif isinstance(thing, type) and thing.__module__ == module and owner is not thing:
                known.append((name, thing))
                if not isinstance(owner, type):
                    self._keep(label + "." + name, thing, module)
        self._add(label + ".", vars(owner), known)

    def _add(self, label, now, known):
        known = [(n, t) for n, t in known if label + n not in _CHANGED_BY_PYTEST]
        names, things = [n for n, _ in known], [t for _, t in known]
        self.kept.append((label, now.get, names, things, known))

    def look_again(self):
        """Compare, unless that was done a moment ago."""
        if self.clock() - self.last >= self.every_seconds:
            self.look()
            self.last = self.clock()

    def look(self):
        """Compare once more: by identity, as the things' own idea of equality may lie."""
        every, each, same = self.all, self.map, self.is_
        for label, get, names, things, known in self.kept:
            if not every(each(same, each(get, names), things)):
                for name, thing in known:  # no builtin from here on, as it may be another by now
                    if get(name) is not thing:
                        self.found.add(label + name)
