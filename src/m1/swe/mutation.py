"""Bugs made from healthy code: one small change in the package, noticed by its own tests."""

import ast
import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from m1.sandbox.base import Backend
from m1.swe.builder import Built, Rejected, contrast, make_environment, with_metadata
from m1.swe.diffs import tree_diff
from m1.swe.files import is_source
from m1.swe.instance import Environment, Instance
from m1.swe.releases import Release, normal_name
from m1.swe.statement import observations, without_leaks
from m1.swe.store import EnvironmentStore
from m1.swe.suite import SuiteRun, run_suite

_COMPARISONS = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is",
}  # fmt: skip
_SIGNS = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
    ast.In: "in", ast.NotIn: "not in", ast.Is: "is", ast.IsNot: "is not",
}  # fmt: skip
_OPERATORS = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"),
              ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "//")}  # fmt: skip
_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "startswith": "endswith",
          "lstrip": "rstrip", "rstrip": "lstrip", "append": "remove"}  # fmt: skip
MAX_FAILING_SHARE = 0.5
"""A mutant that more of the tests notice is no bug that anybody would report."""


@dataclass(frozen=True)
class Mutation:
    """One replacement of text in one file."""

    file: str
    offset: int
    """In bytes."""
    old: str
    new: str
    operator: str
    line: int

    def apply(self, source: bytes) -> bytes:
        """The file with the fault."""
        end = self.offset + len(self.old.encode())
        assert source[self.offset : end] == self.old.encode()
        return source[: self.offset] + self.new.encode() + source[end:]


def mutations(file: str, source: bytes) -> list[Mutation]:
    """Every mutation of a Python file, inside functions only; none where it is no Python."""
    source_text = source if b"\r" not in source else b""
    try:
        tree = ast.parse(source_text)
    except (SyntaxError, ValueError):
        return []
    starts = [0]
    for line in source.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    found = []
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in function.body:
                for node in ast.walk(statement):
                    for begin, end, new, operator in _changes(node, source, starts):
                        old = source[begin:end].decode()
                        found.append(Mutation(file, begin, old, new, operator, node.lineno))  # type: ignore[attr-defined]
    return sorted(set(found), key=lambda m: (m.offset, m.new))


def _changes(
    node: ast.AST, source: bytes, starts: list[int]
) -> Iterator[tuple[int, int, str, str]]:
    """Begin, end, new text and kind of what can be changed at a node."""

    def begin(part: ast.expr | ast.stmt) -> int:
        return starts[part.lineno - 1] + part.col_offset

    def end(part: ast.expr | ast.stmt) -> int:
        assert part.end_lineno is not None and part.end_col_offset is not None
        return starts[part.end_lineno - 1] + part.end_col_offset

    def between(left: ast.expr, right: ast.expr, sign: str) -> int:
        """Where a sign stands between two operands, if nothing but spaces is around it."""
        gap = source[end(left) : begin(right)]
        return end(left) + gap.index(sign.encode()) if gap.decode().split() == sign.split() else -1

    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
        sign = _SIGNS[type(node.ops[0])]
        place = between(node.left, node.comparators[0], sign)
        if place >= 0 and source[place : place + len(sign)].decode() == sign:
            yield place, place + len(sign), _COMPARISONS[type(node.ops[0])], "comparison"
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        sign, other = _OPERATORS[type(node.op)]
        place = between(node.left, node.right, sign)
        if place >= 0:
            yield place, place + len(sign), other, "arithmetic"
    elif isinstance(node, ast.BoolOp) and len(node.values) == 2:
        sign, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        place = between(node.values[0], node.values[1], sign)
        if place >= 0:
            yield place, place + len(sign), other, "connective"
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield begin(node), end(node), str(node.value + 1), "constant"
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield begin(node), end(node), str(not node.value), "constant"
    elif isinstance(node, ast.If | ast.While | ast.IfExp) and not isinstance(
        node.test, ast.UnaryOp
    ):
        test = source[begin(node.test) : end(node.test)].decode()
        if "\n" not in test:
            yield begin(node.test), end(node.test), f"not ({test})", "condition"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield begin(node), begin(node.operand), "", "condition"
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        if name in _CALLS:
            yield end(node.func) - len(name), end(node.func), _CALLS[name], "call"
    elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield begin(node.value), end(node.value), "None", "return"


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


@dataclass(frozen=True)
class HealthyPackage:
    """A release whose own tests pass, ready to be broken."""

    release: Release
    environment: Environment
    run: SuiteRun


def healthy(
    release: Release, store: EnvironmentStore, backend: Backend, *, test_seconds: float = 20.0
) -> HealthyPackage:
    """Build the release's environment and run its tests once.

    Raises:
        Rejected: It has no tests, or none passes.
        SiteError: Dependencies cannot be installed.
    """
    environment = make_environment(release, release, store)
    tree, _ = store.tree(with_metadata(release), release.executables)
    environment = environment.model_copy(update={"tree": tree})
    run = run_suite(environment, store, backend, test_seconds=test_seconds)
    if run.infra_error:
        raise Rejected(f"infrastructure: {run.infra_error}")
    passing = sum(o.outcome == "passed" for o in run.tests.values())
    if not passing:
        raise Rejected(run.problems[0] if run.problems else "no test of the package passes")
    environment = environment.model_copy(update={"allowed_changes": run.changed})
    return HealthyPackage(release, environment, run)


def choose(release: Release, *, seed: int) -> list[Mutation]:
    """All mutations of a release's sources in random order, one a line at most."""
    found: dict[tuple[str, int], list[Mutation]] = {}
    for name, data in sorted(release.files.items()):
        if is_source(name) and name.endswith(".py"):
            for mutation in mutations(name, data):
                found.setdefault((name, mutation.line), []).append(mutation)
    draw = random.Random(seed)
    chosen = [draw.choice(options) for _, options in sorted(found.items())]
    draw.shuffle(chosen)
    return chosen


def build_mutant(
    package: HealthyPackage,
    mutation: Mutation,
    store: EnvironmentStore,
    backend: Backend,
    *,
    test_seconds: float = 20.0,
) -> Built:
    """The instance of one mutation.

    Raises:
        Rejected: No test notices it, or nearly all do.
    """
    release, environment = package.release, package.environment
    files = with_metadata(release)
    broken = {**files, mutation.file: mutation.apply(files[mutation.file])}
    fault = {mutation.file: broken[mutation.file]}
    gold = tree_diff(fault, {mutation.file: files[mutation.file]})
    trial = run_suite(
        environment,
        store,
        backend,
        patch=tree_diff({mutation.file: files[mutation.file]}, fault),
        test_seconds=test_seconds,
        is_explained=True,
    )
    fail, keep, unproven = contrast(trial, package.run)
    if len(fail) > MAX_FAILING_SHARE * len(package.run.tests):
        raise Rejected(f"{len(fail)} of {len(package.run.tests)} tests notice it: it breaks all")
    tree, commit = store.tree(broken, release.executables)
    name, version = normal_name(release.sdist.package), release.sdist.version
    mark = hashlib.sha256(f"{mutation}".encode()).hexdigest()[:8]
    instance = Instance(
        repo=f"pypi/{name}",
        instance_id=f"{name}__{version}-mutant-{mark}",
        base_commit=commit,
        problem_statement=_statement(name, gold, trial, fail),
        patch=gold,
        fail_to_pass=fail,
        pass_to_pass=keep,
        version=version,
        license=release.license,
        provenance={
            "kind": "mutation",
            "package": release.sdist.package,
            "version": version,
            "sdist": {"file": release.sdist.file, "sha256": release.sdist.sha256},
            "mutation": _as_json(mutation),
        },
        environment=environment.model_copy(update={"tree": tree, "unproven": unproven}),
    )
    return Built(instance, trial, package.run)


def _as_json(mutation: Mutation) -> Mapping[str, str | int]:
    return {
        "file": mutation.file,
        "offset": mutation.offset,
        "old": mutation.old,
        "new": mutation.new,
        "operator": mutation.operator,
        "line": mutation.line,
    }


def _statement(name: str, gold: str, trial: SuiteRun, failing: tuple[str, ...]) -> str:
    text = f"{name}: behaviour to mend\n\n{observations(failing, trial)}\n"
    return without_leaks(text, gold) + "\n"
