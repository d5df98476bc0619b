"""Instances from pairs of source releases: the older tree, the newer one's tests.

The recipe: the base tree is the older release; the gold patch is what the newer one changes in the
package itself; the tests are the newer release's, run on both. A test that fails on the base and
passes with the gold patch shows the fault; one that passes on both guards against regressions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict

from m1.sandbox.base import Backend
from m1.swe.diffs import tree_diff
from m1.swe.files import is_source, python_path, tests_of
from m1.swe.instance import Environment, Instance
from m1.swe.releases import PackageIndex, Release, is_older, normal_name
from m1.swe.statement import problem_statement
from m1.swe.store import EnvironmentStore, requirements_of
from m1.swe.suite import SuiteRun, run_suite

_PLUGINS = {"hypothesis": "_hypothesis_pytestplugin", "pytest-asyncio": "pytest_asyncio.plugin",
            "anyio": "anyio.pytest_plugin", "pytest-mock": "pytest_mock",
            "pytest-subtests": "pytest_subtests.plugin", "pytest-timeout": "pytest_timeout",
            "pytest-httpserver": "pytest_httpserver.pytest_plugin"}  # fmt: skip
"""Module of the plugin by package, for those that tests depend on by fixture or mark."""
_TEST_TOOLS = ("hypothesis", "pytest-asyncio", "pytest-mock", "pytest-subtests", "freezegun",
               "pytest-timeout")  # fmt: skip
MAX_PATCH_LINES = 600
MAX_FAIL_TO_PASS = 100


class Rejected(Exception):
    """A pair or mutation that makes no instance; the text is the reason."""


class _Archive(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")
    file: str = ""
    sha256: str = ""


class Pair(BaseModel):
    """Two releases of a package; a row of a pairs file. Further fields of rows are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    package: str
    base_version: str
    fix_version: str
    test_files: tuple[str, ...] = ()
    """Files of the fix release whose tests count; empty: all."""
    scope: str = ""
    """`all test files...`: `test_files` names only those with failing tests, and all are run."""
    base_sdist: _Archive = _Archive()
    fix_sdist: _Archive = _Archive()


@dataclass(frozen=True)
class Built:
    """An instance and the two runs that it rests on."""

    instance: Instance
    base_run: SuiteRun
    gold_run: SuiteRun


def build_pair(
    pair: Pair,
    index: PackageIndex,
    store: EnvironmentStore,
    backend: Backend,
    *,
    test_seconds: float = 60.0,
) -> Built:
    """Fetch both releases and build the instance.

    Raises:
        IndexUnreachable: The index is needed and does not answer.
        ReleaseError: A release is missing or not the one that was named.
        SiteError: Dependencies cannot be installed.
        Rejected: The pair shows no fault that its tests see.
    """
    if not is_older(pair.base_version, pair.fix_version):
        raise Rejected(
            f"base_version {pair.base_version} is not older than fix_version {pair.fix_version}; "
            "swap them"
        )
    base = index.fetch(pair.package, pair.base_version, sha256=pair.base_sdist.sha256 or None)
    fix = index.fetch(pair.package, pair.fix_version, sha256=pair.fix_sdist.sha256 or None)
    chosen = () if pair.scope.startswith("all test files") else pair.test_files
    return build_releases(base, fix, store, backend, test_files=chosen, test_seconds=test_seconds)


def build_releases(
    base: Release,
    fix: Release,
    store: EnvironmentStore,
    backend: Backend,
    *,
    test_files: Sequence[str] = (),
    test_seconds: float = 60.0,
) -> Built:
    """The instance of two releases; see `build_pair`."""
    package = normal_name(base.sdist.package)
    gold = _gold_patch(base.files, fix.files)
    environment = make_environment(base, fix, store, test_files=test_files)
    tree, commit = store.tree(with_metadata(base), base.executables)
    environment = environment.model_copy(update={"tree": tree})
    before = run_suite(environment, store, backend, test_seconds=test_seconds, is_explained=True)
    after = run_suite(environment, store, backend, patch=gold, test_seconds=test_seconds)
    own = tuple(sorted({*before.changed, *after.changed}))
    environment = environment.model_copy(update={"allowed_changes": own})
    fail, keep, unproven = contrast(before, after)
    instance = Instance(
        repo=f"pypi/{package}",
        instance_id=f"{package}__{base.sdist.version}-{fix.sdist.version}",
        base_commit=commit,
        problem_statement=problem_statement(fix, gold, before, fail),
        patch=gold,
        test_patch=tree_diff(_texts(tests_of(base.files)), _texts(tests_of(fix.files))),
        fail_to_pass=fail,
        pass_to_pass=keep,
        version=base.sdist.version,
        license=fix.license or base.license,
        provenance={
            "kind": "releases",
            "package": base.sdist.package,
            "base_version": base.sdist.version,
            "fix_version": fix.sdist.version,
            "test_files": list(environment.test_files),
            "base_sdist": {"file": base.sdist.file, "sha256": base.sdist.sha256},
            "fix_sdist": {"file": fix.sdist.file, "sha256": fix.sdist.sha256},
        },
        environment=environment.model_copy(update={"unproven": unproven}),
    )
    return Built(instance, before, after)


def make_environment(
    base: Release, fix: Release, store: EnvironmentStore, *, test_files: Sequence[str] = ()
) -> Environment:
    """What the tests of `fix` need, on any tree of the package.

    Raises:
        Rejected: There are no tests, or the package is one that the runner itself needs.
        SiteError: Dependencies cannot be installed.
    """
    tests = tests_of(fix.files)
    chosen = list(test_files) or sorted(filter(is_test_module, tests))
    missing = [name for name in chosen if name not in tests]
    if missing:
        raise Rejected(f"{missing[0]} is not among the tests of {fix.sdist.file}")
    if not chosen:
        raise Rejected("the newer release ships no tests")
    package = normal_name(fix.sdist.package)
    wanted = set(requirements_of(base.metadata, package=package))
    wanted |= set(requirements_of(fix.metadata, package=package))
    imported = b"\n".join(tests.values())
    tools = [t for t in _TEST_TOOLS if f"import {t.replace('-', '_')}".encode() in imported
             or f"from {t.replace('-', '_')}".encode() in imported]  # fmt: skip
    if b"mark.asyncio" in imported and "pytest-asyncio" not in tools:
        tools.append("pytest-asyncio")
    if b"(mocker" in imported or b", mocker" in imported:
        tools.append("pytest-mock")
    site = store.site({*wanted, *tools} - {"pytest"})
    installed = {p.name for p in store.folder("sites", site).iterdir()}
    roots = python_path(fix.files)
    modules = {_module(name, roots) for name in fix.files if is_source(name)} - {None}
    if modules & {name.removesuffix(".py") for name in installed}:
        raise Rejected("the runner itself, or a dependency of it, is this package")
    present = {t for t in (*tools, *(_requirement_name(w) for w in wanted)) if t in _PLUGINS}
    return Environment(
        site=site,
        tests=store.tests(tests),
        python_path=python_path(fix.files),
        test_files=tuple(chosen),
        plugins=tuple(
            sorted(_PLUGINS[t] for t in present if _is_installed(_PLUGINS[t], installed))
        ),
        clock=None if b"freezegun" in imported or b"time_machine" in imported else 1_700_000_000.0,
    )


def contrast(
    before: SuiteRun, after: SuiteRun
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """FAIL_TO_PASS, PASS_TO_PASS, and those of them that do not reach their last line on gold.

    Raises:
        Rejected: Nothing fails before and passes after, or a run cannot be used.
    """
    for name, run in (("base", before), ("gold", after)):
        if run.infra_error:
            raise Rejected(f"{name}: infrastructure: {run.infra_error[:200]}")
        if run.problems and not (name == "gold" and run.changed and len(run.problems) == 1):
            if name == "base" and run.changed and len(run.problems) == 1:
                continue
            if name == "base" and not run.tests and run.errors:
                continue
            raise Rejected(f"{name}: {run.problems[0]}")
    passing = [t for t, o in after.tests.items() if o.outcome == "passed"]
    if not passing:
        detail = f": {after.errors[0].splitlines()[-1]}" if after.errors else ""
        raise Rejected(f"no test passes on gold{detail}"[:300])
    unproven = {t for t in passing if not after.tests[t].is_proven}
    states = {t: before.tests[t].outcome if t in before.tests else "absent" for t in passing}
    failing = [t for t in passing if states[t] not in ("passed", "skipped")]
    if not failing:
        raise Rejected("no test fails on base and passes on gold")
    proven = [t for t in failing if t not in unproven]
    if not proven:
        raise Rejected("no failing test reaches its last line on gold, so none proves that it ran")
    if len(proven) > MAX_FAIL_TO_PASS:
        raise Rejected(f"{len(proven)} tests fail on base: another interface, not a fault")
    keep = [t for t in passing if states[t] == "passed"]
    return tuple(sorted(proven)), tuple(sorted(keep)), tuple(sorted(unproven & {*keep}))


def with_metadata(release: Release) -> dict[str, bytes]:
    """The release's files, with the metadata an installed package has where its code may look."""
    files = dict(release.files)
    if "PKG-INFO" in files and not any(".egg-info/" in name for name in files):
        root = python_path(files)[0]
        folder = f"{normal_name(release.sdist.package).replace('-', '_')}.egg-info/PKG-INFO"
        files[folder if root == "." else f"{root}/{folder}"] = files["PKG-INFO"]
    return files


def is_test_module(name: str) -> bool:
    """Whether a file of tests holds some itself: pytest's default names, `tests.py`, `test.py`."""
    stem = PurePosixPath(name).stem
    return name == "test.py" or (
        name.endswith(".py")
        and (stem.startswith("test_") or stem.endswith("_test") or stem == "tests")
    )


def _gold_patch(base: Mapping[str, bytes], fix: Mapping[str, bytes]) -> str:
    old = {name: data for name, data in base.items() if is_source(name)}
    new = {name: data for name, data in fix.items() if is_source(name)}
    changed = [name for name in {*old, *new} if old.get(name) != new.get(name)]
    compiled = [n for n in {*base, *fix} if n.endswith((".pyx", ".c", ".cpp", ".rs"))]
    if compiled and not any(n.endswith(".py") for n in changed):
        raise Rejected(f"needs compiling ({min(compiled)})")
    if not changed:
        raise Rejected("the package itself does not change between the releases")
    texts = [name for name in changed if _is_text(old.get(name)) and _is_text(new.get(name))]
    patch = tree_diff(
        {n: old[n] for n in texts if n in old}, {n: new[n] for n in texts if n in new}
    )
    count = sum(
        line.startswith(("+", "-")) and not line.startswith(("+++", "---"))
        for line in patch.splitlines()
    )
    if count > MAX_PATCH_LINES:
        raise Rejected(f"{count} lines of the package change: a release, not a fault")
    if not count:
        raise Rejected("only binary files of the package change")
    return patch


def _is_text(data: bytes | None) -> bool:
    if data is None:
        return True
    try:
        return b"\0" not in data and data.decode() is not None
    except UnicodeDecodeError:
        return False


def _texts(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if _is_text(data)}


def _module(name: str, roots: Sequence[str]) -> str | None:
    """Top-level module that a file belongs to."""
    for root in roots:
        rest = name if root == "." else name.removeprefix(f"{root}/")
        if root == "." or rest != name:
            top, _, below = rest.partition("/")
            return top if below else top.removesuffix(".py")
    return None


def _requirement_name(text: str) -> str:
    for stop in "[<>=!~; ":
        text = text.partition(stop)[0]
    return normal_name(text)


def _is_installed(module: str, installed: set[str]) -> bool:
    top = module.split(".")[0]
    return top in installed or f"{top}.py" in installed
