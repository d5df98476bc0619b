"""The verdict on a patch: a fresh tree, tests put in only then, a report that is checked."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from m1.sandbox.base import Backend
from m1.swe import diffs
from m1.swe.instance import Instance
from m1.swe.store import EnvironmentStore
from m1.swe.suite import LIMITS, SuiteRun, run_suite
from m1.types import M1Error


@dataclass(frozen=True)
class Grade:
    """What a patch achieved on an instance."""

    instance_id: str
    resolved: bool
    """Every FAIL_TO_PASS and every PASS_TO_PASS test passed."""
    f2p_rate: float
    """Share of FAIL_TO_PASS tests that passed; 0 when the report cannot be believed."""
    p2p_rate: float
    """Share of PASS_TO_PASS tests that passed; 1 where there are none."""
    infra_error: str | None
    """What failed on our side; the grade then says nothing about the patch."""
    masked: bool
    """Whether a rollout with this grade must be left out of training."""
    log: str
    """What the tests printed, for people."""
    is_patch_applied: bool = True
    is_empty: bool = False
    problems: tuple[str, ...] = ()
    """Why nothing was believed: signs of tampering, a run that ended early, a refused patch."""
    failed: tuple[str, ...] = ()
    """Tests that had to pass and did not."""
    unproven: tuple[str, ...] = ()
    """Tests that pytest called passed though they never reached their last line."""
    seconds: float = 0.0
    pytest_seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Localisation:
    """Places named by a model against those that the gold patch changes."""

    file_recall: float
    file_precision: float
    function_recall: float
    function_precision: float
    gold_files: tuple[str, ...] = field(default=())
    gold_functions: tuple[str, ...] = field(default=())


def grade(
    instance: Instance,
    patch: str,
    store: EnvironmentStore,
    backend: Backend,
    *,
    test_seconds: float = 60.0,
) -> Grade:
    """Run the instance's tests on a fresh tree with the patch.

    What the patch does to test files, to settings of pytest and of the interpreter is undone
    before they run (`inside.runner.prepare`).
    """
    is_empty = not patch.strip()
    try:
        diffs.parse(patch)
    except diffs.PatchError as error:
        return _refused(instance, str(error))
    run = run_suite(
        instance.environment,
        store,
        backend,
        patch="" if is_empty else patch,
        test_seconds=test_seconds,
        limits=LIMITS,
    )
    return judge(instance, run, is_empty=is_empty)


def judge(instance: Instance, run: SuiteRun, *, is_empty: bool = False) -> Grade:
    """The grade that one run of the tests amounts to."""
    unproven = set(instance.environment.unproven)
    f2p = [run.passed(t, unproven=unproven) for t in instance.fail_to_pass]
    p2p = [run.passed(t, unproven=unproven) for t in instance.pass_to_pass]
    wanted = (*instance.fail_to_pass, *instance.pass_to_pass)
    claimed = {t for t in wanted if t in run.tests and run.tests[t].outcome == "passed"}
    return Grade(
        instance_id=instance.instance_id,
        resolved=bool(f2p) and all(f2p) and all(p2p),
        f2p_rate=sum(f2p) / len(f2p) if f2p else 0.0,
        p2p_rate=sum(p2p) / len(p2p) if p2p else 1.0,
        infra_error=run.infra_error,
        masked=run.infra_error is not None,
        log=run.log,
        is_patch_applied=run.is_patch_applied,
        is_empty=is_empty,
        problems=run.problems,
        failed=tuple(t for t, ok in zip(wanted, (*f2p, *p2p), strict=True) if not ok),
        unproven=tuple(sorted(t for t in claimed - unproven if not run.tests[t].is_proven)),
        seconds=run.seconds,
        pytest_seconds=run.pytest_seconds,
    )


def _refused(instance: Instance, reason: str) -> Grade:
    return Grade(
        instance_id=instance.instance_id,
        resolved=False,
        f2p_rate=0.0,
        p2p_rate=0.0,
        infra_error=None,
        masked=False,
        log=reason,
        is_patch_applied=False,
        problems=(reason,),
        failed=(*instance.fail_to_pass, *instance.pass_to_pass),
    )


# Reward policies


def all_or_nothing(found: Grade) -> float:
    """1 when resolved, else 0 (paper sec. 4.1: all relevant tests pass, or no positive reward)."""
    return float(found.resolved)


def regressions_negative(found: Grade) -> float:
    """1 when resolved; -1 when a test that passed before fails now; else 0.

    The paper's "zero or negative" (sec. 4.1): negative for regressions and for patches that are no
    patches or make the tests end early, zero for a fault that is still there.
    """
    if found.resolved:
        return 1.0
    return -1.0 if found.p2p_rate < 1.0 or found.problems else 0.0


def partial_credit(found: Grade) -> float:
    """1 when resolved; else half the share of mended tests, if nothing regressed; not the paper."""
    if found.resolved:
        return 1.0
    return 0.5 * found.f2p_rate if found.p2p_rate == 1.0 else 0.0


POLICIES: dict[str, Callable[[Grade], float]] = {
    "all_or_nothing": all_or_nothing,
    "regressions_negative": regressions_negative,
    "partial_credit": partial_credit,
}


def reward(found: Grade, policy: str = "all_or_nothing") -> float | None:
    """Training reward of a grade; None when it is masked.

    Raises:
        M1Error: There is no such policy.
    """
    if policy not in POLICIES:
        raise M1Error(f"reward policy {policy!r} does not exist; use one of {', '.join(POLICIES)}")
    return None if found.masked else POLICIES[policy](found)


def localise(
    instance: Instance,
    store: EnvironmentStore,
    *,
    files: Sequence[str],
    functions: Sequence[str] = (),
) -> Localisation:
    """Grade named files and `file::Class.function` places against the gold patch.

    Where gold changes no function (module-level lines only), function scores are those of files.
    """
    tree = store.read("trees", instance.environment.tree)
    sources = {n: d.decode(errors="replace") for n, d in tree.items() if n.endswith(".py")}
    gold = diffs.touched(instance.patch, sources)
    file_recall, file_precision = _overlap(gold.files, set(files))
    function_recall, function_precision = (
        _overlap(gold.functions, set(functions))
        if gold.functions
        else (file_recall, file_precision)
    )
    return Localisation(
        file_recall,
        file_precision,
        function_recall,
        function_precision,
        tuple(sorted(gold.files)),
        tuple(sorted(gold.functions)),
    )


def _overlap(gold: frozenset[str], named: set[str]) -> tuple[float, float]:
    """Recall and precision; naming nothing has precision 0."""
    hits = len(gold & named)
    return hits / len(gold) if gold else 0.0, hits / len(named) if named else 0.0
