"""Whether an instance can be trusted: the same verdicts in every run, before and after gold."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from m1.sandbox.base import Backend
from m1.swe.instance import Instance
from m1.swe.store import EnvironmentStore
from m1.swe.suite import SuiteRun, run_suite


@dataclass(frozen=True)
class Validation:
    """What N runs on each side showed."""

    instance_id: str
    is_valid: bool
    reasons: tuple[str, ...]
    """Why it is quarantined; empty when it is not."""
    flaky: tuple[str, ...]
    """Tests whose verdict differed between runs of one side."""
    num_runs: int
    seconds: float
    infra_error: str | None = None
    """Set when our side failed: says nothing about the instance."""

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "instance_id": self.instance_id,
            "is_valid": self.is_valid,
            "reasons": list(self.reasons),
            "flaky": list(self.flaky),
            "num_runs": self.num_runs,
            "seconds": round(self.seconds, 2),
            "infra_error": self.infra_error,
        }


def validate(
    instance: Instance,
    store: EnvironmentStore,
    backend: Backend,
    *,
    num_runs: int = 3,
    test_seconds: float = 60.0,
) -> Validation:
    """Run base and gold `num_runs` times each, every run in a fresh sandbox.

    Valid means: on base every FAIL_TO_PASS test fails and every PASS_TO_PASS test passes, and with
    gold all pass, in all runs.
    """
    runs: dict[str, list[SuiteRun]] = {"base": [], "gold": []}
    for _ in range(num_runs):
        for side, patch in (("base", ""), ("gold", instance.patch)):
            run = run_suite(
                instance.environment, store, backend, patch=patch, test_seconds=test_seconds
            )
            runs[side].append(run)
            if run.infra_error:
                return _result(instance, runs, (), (), infra_error=run.infra_error)
    reasons: list[str] = []
    flaky: set[str] = set()
    unproven = set(instance.environment.unproven)
    wanted = (*instance.fail_to_pass, *instance.pass_to_pass)
    for side in ("base", "gold"):
        for test in wanted:
            verdicts = {run.passed(test, unproven=unproven) for run in runs[side]}
            if len(verdicts) > 1:
                flaky.add(test)
        problems = {p for run in runs[side] for p in run.problems}
        reasons += [f"{side}: {p}" for p in sorted(problems) if runs[side][0].tests]
    reasons += [f"flaky: {test}" for test in sorted(flaky)]
    for test in sorted({*instance.fail_to_pass} - flaky):
        if runs["base"][0].passed(test, unproven=unproven):
            reasons.append(f"passes on base: {test}")
        if not runs["gold"][0].passed(test, unproven=unproven):
            reasons.append(f"fails on gold: {test}")
    for test in sorted({*instance.pass_to_pass} - flaky):
        for side in ("base", "gold"):
            if not runs[side][0].passed(test, unproven=unproven):
                reasons.append(f"fails on {side}: {test}")
    if not instance.fail_to_pass:
        reasons.append("no test shows the fault")
    return _result(instance, runs, tuple(reasons), tuple(sorted(flaky)))


def _result(
    instance: Instance,
    runs: dict[str, list[SuiteRun]],
    reasons: tuple[str, ...],
    flaky: tuple[str, ...],
    *,
    infra_error: str | None = None,
) -> Validation:
    return Validation(
        instance_id=instance.instance_id,
        is_valid=not reasons and infra_error is None,
        reasons=reasons,
        flaky=flaky,
        num_runs=min(map(len, runs.values())),
        seconds=sum(run.seconds for side in runs.values() for run in side),
        infra_error=infra_error,
    )


def validate_all(
    instances: Sequence[Instance],
    store: EnvironmentStore,
    backend: Backend,
    *,
    num_runs: int = 3,
    num_parallel: int = 1,
    test_seconds: float = 60.0,
    report: Callable[[Validation], None] | None = None,
) -> list[Validation]:
    """Validate many, some at once; results in the order of the instances."""

    def one(instance: Instance) -> Validation:
        found = validate(instance, store, backend, num_runs=num_runs, test_seconds=test_seconds)
        if report is not None:
            report(found)
        return found

    with ThreadPoolExecutor(num_parallel) as threads:
        return list(threads.map(one, instances))
