"""The verifier `code`: all tests must pass; expected outputs never enter the sandbox."""

import json
import time
from collections import Counter
from typing import Any

from m1.rewards.code.comparing import checked, same_output, same_value
from m1.rewards.code.programs import Program, find_program, has_compiler, install, run_on
from m1.rewards.code.suite import Suite, read_suite
from m1.sandbox.base import ExecResult, SandboxError, SealedSandbox
from m1.sandbox.opening import open_sealed
from m1.types import Task, Verdict

_MAX_SECONDS = 240.0
"""After so long the tests that are left count as failed, so that a verdict comes in time."""
_MAX_FAILURES = 10
"""After so many failed tests the rest count as failed: the reward is decided, time is not free."""


def verify(task: Task, completion: str) -> Verdict:
    """1 when every test passes, else 0; the part `pass_rate` says how many did.

    Raises:
        SandboxError: The sandbox failed, which is no fault of the program.
        CheckerFailed: The task's checker failed.
        M1Error: The reference is no suite.
    """
    suite = read_suite(task.reference)
    program = find_program(completion, suite.language)
    if program is None:
        return Verdict(0.0, "no_program", {"pass_rate": 0.0})
    if program.language == "cpp" and suite.kind == "function":
        return Verdict(0.0, "wrong_language", {"pass_rate": 0.0})
    if program.language == "cpp" and not has_compiler():
        raise SandboxError("there is no /usr/bin/g++ to compile C++; install g++")
    with open_sealed(purpose="program") as sandbox:
        complaint = install(sandbox, program)
        if complaint is not None:
            return Verdict(0.0, f"compile_error: {complaint[:200]}", {"pass_rate": 0.0})
        return _run_all(sandbox, program, suite)


def run_tests(sandbox: SealedSandbox, program: Program, suite: Suite) -> list[str]:
    """Outcome of every test, `passed` or why not; stops early when many fail."""
    outcomes: list[str] = []
    deadline = time.monotonic() + _MAX_SECONDS
    for test in suite.tests:
        has_failed = len(outcomes) - outcomes.count("passed") >= _MAX_FAILURES
        if has_failed or time.monotonic() > deadline:
            outcomes += ["not_run"] * (len(suite.tests) - len(outcomes))
            break
        result = run_on(sandbox, program, suite, test.input)
        outcomes.append(_outcome(suite, test.input, test.output, result))
    return outcomes


def output_of(suite: Suite, result: ExecResult) -> tuple[str | None, Any]:
    """Why a run gave no output to compare, or None and the output."""
    if result.stopped_by is not None:
        return f"limit_{result.stopped_by}", None
    if result.exit_code != 0:
        return "runtime_error", None
    text = result.stdout.decode(errors="replace")
    if suite.kind == "stdin":
        return None, text
    try:
        return None, json.loads(text.rpartition("\n")[2])
    except (ValueError, RecursionError):
        return "no_value", None


def _run_all(sandbox: SealedSandbox, program: Program, suite: Suite) -> Verdict:
    outcomes = run_tests(sandbox, program, suite)
    num_passed = outcomes.count("passed")
    parts = {"pass_rate": num_passed / len(outcomes), "num_tests": float(len(outcomes))}
    if num_passed == len(outcomes):
        return Verdict(1.0, "all_passed", parts)
    first = next(outcome for outcome in outcomes if outcome != "passed")
    counts = ", ".join(f"{n} {name}" for name, n in Counter(outcomes).most_common())
    return Verdict(0.0, f"{first}: {counts}", parts)


def _outcome(suite: Suite, given: Any, expected: Any, result: ExecResult) -> str:
    failure, actual = output_of(suite, result)
    if failure is not None:
        return failure
    return "passed" if is_accepted(suite, given, expected, actual) else "wrong_answer"


def is_accepted(suite: Suite, given: Any, expected: Any, actual: Any) -> bool:
    """Whether an output passes by the suite's comparison."""
    if suite.checker is not None:
        with open_sealed(purpose="checker") as other:
            return checked(other, suite.checker, given=given, expected=expected, actual=actual)
    if suite.kind == "function":
        return same_value(expected, actual, suite.tolerance)
    return same_output(suite, expected, actual)
