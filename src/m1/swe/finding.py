"""Further instances beside those of a pairs file: neighbouring releases, and mutations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from m1.sandbox.base import Backend
from m1.swe.builder import Built, Pair, Rejected
from m1.swe.building import Outcome, Row, why
from m1.swe.mutation import build_mutant, choose, healthy
from m1.swe.releases import PackageIndex, ReleaseError
from m1.swe.search import find_instances
from m1.swe.store import EnvironmentStore, SiteError
from m1.swe.validate import validate
from m1.types import M1Error

Report = Callable[[str, str], None]
_TRIES_PER_MUTANT = 5


@dataclass(frozen=True)
class Search:
    """What to look for."""

    packages: tuple[str, ...] = ()
    """Whose neighbouring releases are tried."""
    max_pairs: int = 10
    max_found: int = 3
    """Instances after which a package is left."""
    releases: tuple[str, ...] = ()
    """`NAME==VERSION` to be broken."""
    num_mutants: int = 5
    seed: int = 1
    num_runs: int = 3
    test_seconds: float = 20.0


def extend(
    outcome: Outcome,
    search: Search,
    known: Sequence[Row],
    store: EnvironmentStore,
    backend: Backend,
    *,
    report: Report,
) -> None:
    """Add what a search finds and validates to an outcome, rejects included.

    Raises:
        IndexUnreachable: The index does not answer.
        M1Error: A release is not written as NAME==VERSION.
    """
    index = PackageIndex(store.archives)
    for attempt in find_instances(
        search.packages,
        index,
        store,
        backend,
        max_pairs=search.max_pairs,
        max_found=search.max_found,
        known=[row for row in known if isinstance(row, Pair)],
        test_seconds=search.test_seconds,
    ):
        pair = attempt.pair
        name = f"{pair.package} {pair.base_version} -> {pair.fix_version}"
        _keep(outcome, name, attempt.built, attempt.reason, search, store, backend, report)
    for release in search.releases:
        _break(outcome, release, search, index, store, backend, report)


def _break(
    outcome: Outcome,
    name: str,
    search: Search,
    index: PackageIndex,
    store: EnvironmentStore,
    backend: Backend,
    report: Report,
) -> None:
    package, equals, version = name.partition("==")
    if not equals:
        raise M1Error(f"{name!r} names no version; write it as NAME==VERSION")
    try:
        release = index.fetch(package, version)
        sound = healthy(release, store, backend, test_seconds=search.test_seconds)
    except (Rejected, ReleaseError, SiteError) as error:
        _keep(outcome, name, None, str(error), search, store, backend, report)
        return
    wanted = len(outcome.instances) + search.num_mutants
    for mutation in choose(release, seed=search.seed)[: search.num_mutants * _TRIES_PER_MUTANT]:
        if len(outcome.instances) >= wanted:
            return
        place = f"{name} {mutation.file}:{mutation.line} {mutation.operator}"
        built, reason = None, ""
        try:
            built = build_mutant(sound, mutation, store, backend, test_seconds=search.test_seconds)
        except Rejected as error:
            reason = str(error)
        _keep(outcome, place, built, reason, search, store, backend, report)


def _keep(
    outcome: Outcome,
    name: str,
    built: Built | None,
    reason: str,
    search: Search,
    store: EnvironmentStore,
    backend: Backend,
    report: Report,
) -> None:
    """Validate what was built, and put it where it belongs."""
    if built is not None:
        found = validate(
            built.instance,
            store,
            backend,
            num_runs=search.num_runs,
            test_seconds=search.test_seconds,
        )
        outcome.validations.append(found)
        reason = "" if found.is_valid else why(found)
        if found.is_valid:
            outcome.instances.append(built.instance)
    if reason or built is None:
        outcome.rejects.append({"name": name, "reason": reason})
    report(name, f"rejected: {reason}" if reason else "valid")
