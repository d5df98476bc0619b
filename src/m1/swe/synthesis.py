"""Tests that a model wrote, graded by what they tell apart (paper sec. 4.1: test synthesis)."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from m1.sandbox.base import Backend
from m1.swe import diffs
from m1.swe.builder import is_test_module
from m1.swe.files import is_source
from m1.swe.instance import Instance
from m1.swe.mutation import Mutation, mutations
from m1.swe.store import EnvironmentStore
from m1.swe.suite import SuiteRun, run_suite
from m1.types import M1Error


@dataclass(frozen=True)
class SynthesisGrade:
    """What the written tests see."""

    fails_on_base: bool
    """At least one test fails on the faulty tree, and the file is collected there."""
    passes_on_gold: bool
    """At least one test passes with the gold patch, by its own last line, and none fails."""
    num_tests: int
    mutation_score: float | None
    """Share of mutants of the mended functions that the tests notice; None without mutants, or
    where the tests do not pass on gold."""
    num_mutants: int
    infra_error: str | None = None

    @property
    def is_valid(self) -> bool:
        """Whether the tests show the fault and accept its solution."""
        return self.fails_on_base and self.passes_on_gold


def grade_tests(
    instance: Instance,
    tests: Mapping[str, bytes],
    store: EnvironmentStore,
    backend: Backend,
    *,
    num_mutants: int = 10,
    test_seconds: float = 20.0,
    seed: int = 0,
) -> SynthesisGrade:
    """Run written test files on base, on gold, and on mutants of what gold mends.

    Args:
        instance: Whose fault the tests are about; its own tests are not run.
        tests: Files by path in the tree.
        store: Where its environment is.
        backend: What runs them.
        num_mutants: At most so many.
        test_seconds: After which a single test counts as failed.
        seed: Of the choice of mutants.

    Raises:
        M1Error: No file is one that pytest collects.
    """
    modules = sorted(filter(is_test_module, tests))
    if not modules:
        raise M1Error(f"none of {sorted(tests)} is a test file; name one test_*.py")
    own = store.read("tests", instance.environment.tests)
    support = {n: d for n, d in own.items() if not is_test_module(n)}

    def run(patch: str) -> SuiteRun:
        return run_suite(
            instance.environment,
            store,
            backend,
            patch=patch,
            tests={**support, **tests},
            files=modules,
            test_seconds=test_seconds,
        )

    before, after = run(""), run(instance.patch)
    error = before.infra_error or after.infra_error
    passing = [t for t in after.tests if after.passed(t)]
    accepts = bool(passing) and _all_pass(after)
    shows = any(o.outcome not in ("passed", "skipped") for o in before.tests.values())
    score, count = None, 0
    if accepts and not error:
        killed = []
        for patch in mutant_patches(instance, store, max_count=num_mutants, seed=seed):
            found = run(patch)
            error = error or found.infra_error
            killed.append(any(not found.passed(t) for t in passing))
        count = len(killed)
        score = sum(killed) / count if killed else None
    return SynthesisGrade(
        shows and not before.problems, accepts, len(after.tests), score, count, error
    )


def _all_pass(run: SuiteRun) -> bool:
    states = {o.outcome for o in run.tests.values()}
    return not run.problems and not run.errors and states <= {"passed", "skipped"}


def mutant_patches(
    instance: Instance, store: EnvironmentStore, *, max_count: int, seed: int
) -> list[str]:
    """Patches of the base tree that mend the fault and break something else in the same functions.

    Where gold changes no function, anywhere in the files that it changes.
    """
    tree = store.read("trees", instance.environment.tree)
    fixed = diffs.apply(instance.patch, tree)
    undone = diffs.reverse(instance.patch)
    texts = {n: d.decode(errors="replace") for n, d in fixed.items() if n.endswith(".py")}
    places = diffs.touched(undone, texts)
    found: list[Mutation] = []
    for name in sorted(places.files):
        if name not in fixed or not is_source(name):
            continue
        spans = diffs.function_spans(texts.get(name, ""))
        inside = [s for s in spans if f"{name}::{s[0]}" in places.functions]
        for mutation in mutations(name, fixed[name]):
            if not inside or any(s[1] <= mutation.line <= s[2] for s in inside):
                found.append(mutation)
    random.Random(seed).shuffle(found)
    patches = []
    for mutation in found[:max_count]:
        names = {*places.files, mutation.file}
        old = {n: tree[n] for n in names if n in tree}
        new = {n: fixed[n] for n in names if n in fixed}
        new[mutation.file] = mutation.apply(new[mutation.file])
        patches.append(diffs.tree_diff(old, new))
    return patches
