"""Running an instance's tests in a fresh sandbox, and deciding what of the report to believe.

A result is believed when the process that ran pytest ended by itself with the status it announced,
this status agrees with the results, no function of pytest, unittest or builtins was replaced, and
every passed test handed over its secret (`m1.swe.proofs`).
"""

import base64
import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from m1.sandbox.base import Backend, ExecResult, Limits, SandboxError, printable
from m1.sandbox.base import Environment as Layers
from m1.swe import proofs
from m1.swe.files import is_test, steers
from m1.swe.inside import child, runner, trees
from m1.swe.instance import Environment
from m1.swe.python import interpreter
from m1.swe.reach import reachable
from m1.swe.store import EnvironmentStore

TREE = "/work/tree"
SITE = "/work/site"
LIMITS = Limits(
    cpu_seconds=600,
    wall_seconds=900,
    memory_mib=2048,
    num_processes=256,
    scratch_mib=512,
    output_bytes=32 << 20,
)
VARIABLES = {
    "TZ": "UTC",
    "LC_ALL": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUTF8": "1",
    "NO_COLOR": "1",
}
"""What makes two runs alike: time zone, hashes, locale."""
_BOOT = """
import sys
sys.path.remove("")
import json, types
for name, source in json.loads(sys.stdin.buffer.readline()):
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = "{token}"
    exec(compile(source, "{token}", "exec"), module.__dict__)
module.main(json.loads(sys.stdin.buffer.read()))
"""


@dataclass(frozen=True)
class TestOutcome:
    """What became of one test."""

    __test__ = False

    outcome: str
    """`passed`, `failed`, `skipped`, `timeout`, `crash` or `running` (never finished)."""
    is_proven: bool
    """Whether it reached the end of its body."""
    message: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class SuiteRun:
    """One run of an instance's tests."""

    tests: Mapping[str, TestOutcome]
    is_patch_applied: bool
    problems: tuple[str, ...] = ()
    """Why the report cannot be believed; empty when it can."""
    changed: tuple[str, ...] = ()
    """Signs of tampering: functions of pytest, unittest or builtins that were replaced, and looks
    of the code under test at its tests or at the process that runs them."""
    infra_error: str | None = None
    """What failed on our side."""
    log: str = ""
    seconds: float = 0.0
    pytest_seconds: float = 0.0
    errors: tuple[str, ...] = field(default=())
    """Files that could not be collected, and why."""

    def passed(self, test: str, *, unproven: Collection[str] = ()) -> bool:
        """Whether a test passed, beyond the word of the process that ran it."""
        found = self.tests.get(test)
        if found is None or self.problems or self.infra_error:
            return False
        return found.outcome == "passed" and (found.is_proven or test in unproven)


def layers_of(environment: Environment, store: EnvironmentStore, backend: Backend) -> Layers:
    """What a sandbox of an instance begins with: its tree and its dependencies."""
    site = store.folder("sites", environment.site)
    tree = store.folder("trees", environment.tree)
    if backend.name != "bubblewrap":
        return Layers(image=environment.image, layers={TREE: tree, SITE: site})
    python = interpreter(store)
    return Layers(
        layers={TREE: reachable(tree, key=f"tree/{environment.tree}")},
        read_only={
            SITE: reachable(site, key=f"site/{environment.site}"),
            **{path: reachable(f, key=f"python/{f.name}") for path, f in python.mounts.items()},
        },
    )


def run_suite(
    environment: Environment,
    store: EnvironmentStore,
    backend: Backend,
    *,
    patch: str = "",
    tests: Mapping[str, bytes] | None = None,
    files: Collection[str] | None = None,
    only: Collection[str] | None = None,
    test_seconds: float = 60.0,
    limits: Limits = LIMITS,
    is_explained: bool = False,
) -> SuiteRun:
    """Apply a patch to a fresh tree, put the tests in place, run them.

    Args:
        environment: Of the instance.
        store: Where its layers are.
        backend: What opens the sandbox.
        patch: Unified diff; empty for the tree as it is. `diffs.parse` must have found it safe.
        tests: Test files in place of the environment's.
        files: Files to run in place of the environment's.
        only: Node ids to run; absent: all of the files.
        test_seconds: After which a single test is killed.
        limits: Of the sandbox.
        is_explained: Have failed assertions show their values, for people; changes the tests' code.
    """
    tests = store.read("tests", environment.tests) if tests is None else tests
    job, expected = _job(environment, store, tests)
    job |= {
        "patch": patch,
        "files": sorted(files if files is not None else environment.test_files),
        "only": sorted(only) if only is not None else None,
        "test_seconds": test_seconds,
        "assertions": "rewrite" if is_explained else "plain",
        "wall_seconds": limits.wall_seconds * 0.95,
    }
    boot = _BOOT.format(token=secrets.token_hex(8))
    command = [*_python(store, backend), "-s", "-S", "-c", boot]
    try:
        with backend.open(layers_of(environment, store, backend), limits=limits) as sandbox:
            done = sandbox.exec(
                command,
                stdin=_program() + json.dumps(job).encode(),
                environment=VARIABLES,
            )
    except (SandboxError, OSError) as error:
        return SuiteRun({}, False, infra_error=f"{type(error).__name__}: {error}")
    return _read(done, expected, environment)


@cache
def _program() -> bytes:
    """The modules that run inside, in order of import, as one line of JSON."""
    modules = [["m1", ""], ["m1.swe", ""], ["m1.swe.inside", ""]]
    for module in (trees, child, runner):
        modules.append([module.__name__, Path(str(module.__file__)).read_text()])
    return json.dumps(modules).encode() + b"\n"


def _python(store: EnvironmentStore, backend: Backend) -> tuple[str, ...]:
    return interpreter(store).command if backend.name == "bubblewrap" else ("python3",)


def _job(
    environment: Environment, store: EnvironmentStore, tests: Mapping[str, bytes]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the runner is told, and the function that each secret belongs to."""
    function = f"_m1_{secrets.token_hex(8)}"
    expected: dict[str, str] = {}
    write: dict[str, tuple[str, bool]] = {}
    for name, data in tests.items():
        if name.endswith(".py"):
            proven = proofs.insert(data, function=function, secret=lambda: secrets.token_hex(12))
            data = proven.source
            for qualified, secret in proven.secrets.items():
                expected[secret] = qualified.rpartition(".")[2]
        write[name] = (base64.b64encode(data).decode(), False)
    site = str(store.folder("sites", environment.site))
    for name, data in store.read("trees", environment.tree).items():
        if not is_test(name) and steers(name, environment.python_path, site):
            write[name] = (base64.b64encode(data).decode(), False)
    job = {
        "tree": TREE,
        "site": SITE,
        "python_path": environment.python_path,
        "function": function,
        "write": write,
        "plugins": environment.plugins,
        "clock": environment.clock,
    }
    return job, expected


def _read(done: ExecResult, expected: Mapping[str, str], environment: Environment) -> SuiteRun:
    log = printable(done.stderr[-2000:])
    try:
        found = json.loads(done.stdout)
        patch, attempts = found["patch"], found["attempts"]
    except (ValueError, KeyError, TypeError):
        if done.exit_code in (126, 127):
            return SuiteRun({}, False, infra_error=f"no runner: {log}", seconds=done.seconds)
        reason = f"the runner was killed ({done.stopped_by or done.exit_code})"
        return SuiteRun({}, True, (reason,), log=log, seconds=done.seconds)
    if patch is not None and not patch["is_applied"]:
        is_ours = patch.get("is_ours", False)
        return SuiteRun(
            {},
            False,
            () if is_ours else ("the patch does not apply",),
            infra_error=patch["error"] if is_ours else None,
            log=patch["error"],
            seconds=done.seconds,
        )
    outcomes = {
        test: TestOutcome(
            record["outcome"],
            any(expected.get(secret) == _function(test) for secret in record["proofs"]),
            record["message"],
            record["seconds"],
        )
        for test, record in found["tests"].items()
    }
    replaced = {name for a in attempts for name in a["changed"]}
    changed = tuple(sorted(replaced - set(environment.allowed_changes)))
    problems = _problems(attempts, outcomes, done)
    if changed:
        problems = (*problems, f"tampering: {', '.join(changed[:5])}")
    return SuiteRun(
        tests=outcomes,
        is_patch_applied=True,
        problems=problems,
        changed=changed,
        log=printable(found["log"].encode(errors="replace")),
        seconds=done.seconds,
        pytest_seconds=sum(a["seconds"] for a in attempts),
        errors=tuple(found["errors"]),
    )


def _problems(
    attempts: list[dict[str, Any]], outcomes: Mapping[str, TestOutcome], done: ExecResult
) -> tuple[str, ...]:
    if not attempts:
        return ("no test was started",)
    last = attempts[-1]
    if done.stopped_by:
        return (f"the sandbox was stopped by its limit: {done.stopped_by}",)
    if not last["is_complete"]:
        said = last["said_status"]
        what = "without a word" if said is None else f"with {last['status']} after saying {said}"
        return (f"the tests' process ended early, {last['stopped_by'] or what}",)
    is_rest_empty = len(attempts) > 1 and last["status"] == 5  # the last test was interrupted
    if last["status"] not in (0, 1) and not is_rest_empty:
        return (f"pytest ended with status {last['status']}",)
    if len(attempts) == 1 and last["status"] == 0:
        failed = [t for t, o in outcomes.items() if o.outcome not in ("passed", "skipped")]
        if failed:
            return (f"pytest ended with status 0, but {failed[0]} did not pass",)
    return ()


def _function(test: str) -> str:
    """Name of the function behind a node id."""
    rest = test.partition("::")[2].partition("[")[0]
    return rest.rpartition("::")[2]
