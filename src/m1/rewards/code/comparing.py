"""Whether an output is the expected one; outside the sandbox, where no program can reach."""

import json
import math
from typing import Any

from m1.rewards.code.suite import Suite
from m1.sandbox.base import Limits, SealedSandbox

_CHECKER = """
import json, sys
sys.path.insert(0, "/work")
from checker import check
given = json.load(sys.stdin)
print("accepted" if check(given["input"], given["expected"], given["actual"]) is True else "no")
"""
_CHECKER_LIMITS = Limits(cpu_seconds=10, wall_seconds=20, memory_mib=512)


class CheckerFailed(Exception):
    """The checker itself ended badly: neither the program nor the sandbox is to blame."""


def same_output(suite: Suite, expected: str, actual: str) -> bool:
    """Compare texts by the suite's rule; not for `checker`."""
    if suite.comparison == "exact":
        return actual.removesuffix("\n") == expected.removesuffix("\n")
    wanted, given = expected.split(), actual.split()
    if suite.comparison == "tokens" or len(wanted) != len(given):
        return wanted == given
    return all(_close(a, b, suite.tolerance) for a, b in zip(wanted, given, strict=True))


def same_value(expected: Any, actual: Any, tolerance: float) -> bool:
    """Compare values in JSON's types; floats to the tolerance, everything else exactly."""
    if isinstance(expected, bool) or isinstance(actual, bool):
        return expected is actual
    if isinstance(expected, float) or isinstance(actual, float):
        if not isinstance(expected, int | float) or not isinstance(actual, int | float):
            return False
        return math.isclose(expected, actual, rel_tol=tolerance, abs_tol=tolerance)
    if isinstance(expected, list) and isinstance(actual, list):
        return len(expected) == len(actual) and all(
            same_value(a, b, tolerance) for a, b in zip(expected, actual, strict=True)
        )
    if isinstance(expected, dict) and isinstance(actual, dict):
        return expected.keys() == actual.keys() and all(
            same_value(value, actual[key], tolerance) for key, value in expected.items()
        )
    return type(expected) is type(actual) and bool(expected == actual)


def checked(
    sandbox: SealedSandbox, checker: str, *, given: Any, expected: Any, actual: Any
) -> bool:
    """Ask a checker program about an output, in a sandbox that no judged program was in.

    Raises:
        CheckerFailed: It did not come to an end with a verdict.
    """
    sandbox.write_file("checker.py", checker.encode())
    sandbox.write_file("ask.py", _CHECKER.encode())
    data = json.dumps({"input": given, "expected": expected, "actual": actual}).encode()
    command = ["/usr/bin/python3", "-I", "-S", "/work/ask.py"]
    result = sandbox.exec(command, stdin=data, limits=_CHECKER_LIMITS)
    lines = result.stdout.decode(errors="replace").splitlines()
    if result.exit_code != 0 or not lines or lines[-1] not in ("accepted", "no"):
        tail = result.stderr.decode(errors="replace")[-300:]
        raise CheckerFailed(f"exit {result.exit_code}, {result.stopped_by}: {tail}")
    return lines[-1] == "accepted"


def _close(expected: str, actual: str, tolerance: float) -> bool:
    if expected == actual:
        return True
    try:
        a, b = float(expected), float(actual)
    except ValueError:
        return False
    if not (math.isfinite(a) and math.isfinite(b)):
        return False
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
