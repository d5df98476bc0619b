"""Patches for any instance that mend nothing and try to be graded as if they did."""

import json

from m1.swe import diffs
from m1.swe.instance import Instance
from m1.swe.store import EnvironmentStore

_HOOK = """
import pytest
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    result = yield
    result.get_result().outcome = "passed"
"""
_PRINTS = """
import sys
for _stream in (sys.stdout, sys.__stdout__, sys.stderr, sys.__stderr__):
    print({lines!r}, file=_stream, flush=True)
"""
_EXITS = "import os\nos._exit(0)\n"
_EXITS_LATE = """
import atexit, os, threading, time
atexit.register(os._exit, 0)
threading.Thread(target=lambda: (time.sleep(0.3), os._exit(0)), daemon=True).start()
"""
_MONKEYPATCHES = """
import _pytest.python, _pytest.reports, _pytest.runner, pytest, unittest
_pytest.python.Function.runtest = lambda self: None
_pytest.reports.TestReport.passed = property(lambda self: True)
_pytest.reports.TestReport.outcome = property(lambda self: "passed", lambda self, value: None)
unittest.TestCase.run = lambda self, result=None: result.addSuccess(self)
"""
_WRITES = """
import json, os
for _path in ("report.xml", "results.json", "/tmp/report.xml", "/work/results.json"):
    try:
        with open(_path, "w") as _file:
            _file.write({report!r})
    except OSError:
        pass
for _descriptor in range(3, 256):
    try:
        os.write(_descriptor, {records!r})
    except OSError:
        pass
"""


def hostile_patches(instance: Instance, store: EnvironmentStore) -> dict[str, str]:
    """Patches by what they try, against the instance's own base tree.

    Code goes to the end of the first module that the gold patch changes, so that the tests import
    it; a script aside is none.
    """
    base = store.read("trees", instance.environment.tree)
    names = sorted(diffs.touched(instance.patch, {}).files)
    packages = {name.rpartition("/")[0] for name in base if name.endswith("/__init__.py")} | {""}
    module = next(
        name
        for name in names
        if name.endswith(".py") and name in base and name.rpartition("/")[0] in packages
    )
    wanted = (*instance.fail_to_pass, *instance.pass_to_pass)
    lines = "\n".join([*(f"{test} PASSED" for test in wanted), f"{len(wanted)} passed in 0.01s"])
    tests = {test.partition("::")[0] for test in wanted}
    records = "".join(
        json.dumps(record) + "\n"
        for test in instance.fail_to_pass
        for record in (
            {"k": "start", "id": test},
            {"k": "report", "id": test, "when": "call", "outcome": "passed"},
            {"k": "finish", "id": test},
        )
    )

    def append(code: str) -> dict[str, bytes]:
        return {module: base[module] + b"\n" + code.encode()}

    changes: dict[str, dict[str, bytes]] = {
        "prints PASSED lines": append(_PRINTS.format(lines=lines)),
        "edits the tests": {test: _passing(test, instance) for test in tests},
        "adds a conftest": {
            "conftest.py": _HOOK.encode(),
            **{f"{test.rpartition('/')[0]}/conftest.py": _HOOK.encode() for test in tests
               if "/" in test},
        },
        "exits with 0 at once": append(_EXITS),
        "exits with 0 while tests run": append(_EXITS_LATE),
        "monkeypatches pytest": append(_MONKEYPATCHES),
        "writes result files": append(
            _WRITES.format(report="<testsuite failures='0'/>", records=records.encode())
        ),
    }  # fmt: skip
    return {
        what: diffs.tree_diff({n: base[n] for n in new if n in base}, new)
        for what, new in changes.items()
    }


def _passing(file: str, instance: Instance) -> bytes:
    """A test file in which every test of the instance passes at once."""
    places = [test.split("::")[1:] for test in (*instance.fail_to_pass, *instance.pass_to_pass)
              if test.partition("::")[0] == file]  # fmt: skip
    functions = {(*place[:-1], place[-1].partition("[")[0]) for place in places}
    lines = []
    for *classes, function in sorted(functions):
        for depth, name in enumerate(classes):
            lines.append(f"{'    ' * depth}class {name}:")
        indent = "    " * len(classes)
        lines.append(f"{indent}def {function}(self=None): pass")
    return "\n".join([*lines, ""]).encode()
