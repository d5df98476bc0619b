"""Repair in fixed steps, without an agent: places first, then samples, then tests choose.

After Agentless (Xia et al., 2024), with the retrieval by embeddings left out: files are named from
the list of files, elements from the files' outlines, repairs are sampled, those that break tests of
the repository are dropped, and the most frequent of the rest is taken.
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from m1.rewards.code.chat_model import ChatModel, Message
from m1.rollout.actions import ActionError, apply_edit, parse_edits
from m1.sandbox.base import Backend
from m1.swe.builder import is_test_module
from m1.swe.diffs import function_spans, tree_diff
from m1.swe.files import is_source, tests_of
from m1.swe.instance import Instance
from m1.swe.store import EnvironmentStore
from m1.swe.suite import run_suite

_MAX_OUTLINE_LINES = 400
_MAX_CONTEXT_LINES = 1200
_FILES = """\
A repository has these files:

{files}

A fault is reported:

{statement}

Name the files that must change, most likely first, at most {count}. Answer with a JSON array of
paths and nothing else."""
_ELEMENTS = """\
A fault is reported:

{statement}

Outlines of files that may hold it:

{outlines}

Name the functions that must change, most likely first, at most {count}. Answer with a JSON array of
texts like "path.py::Class.function" and nothing else."""
_REPAIR = """\
A fault is reported:

{statement}

The code in question:

{context}

Mend it. Answer with one or more blocks of this form; the text under SEARCH must stand in the file
exactly once, copied as it is:

```edit path.py
<<<<<<< SEARCH
old lines
=======
new lines
>>>>>>> REPLACE
```"""


@dataclass(frozen=True)
class AgentlessConfig:
    """How much to look at and to sample."""

    num_files: int = 3
    num_functions: int = 6
    num_repairs: int = 8
    context_lines: int = 10
    """Lines around a function that are shown with it."""
    test_seconds: float = 20.0


@dataclass(frozen=True)
class AgentlessResult:
    """What was found on the way."""

    patch: str
    """The chosen repair; empty when there was none."""
    files: tuple[str, ...]
    functions: tuple[str, ...]
    num_candidates: int
    """Samples that were repairs at all."""
    num_distinct: int
    num_kept: int
    """Distinct repairs that broke no test of the repository."""
    infra_error: str | None = None


def repair(
    instance: Instance,
    model: ChatModel,
    store: EnvironmentStore,
    backend: Backend,
    config: AgentlessConfig | None = None,
) -> AgentlessResult:
    """Find the places, sample repairs, and choose one by the tests that the tree itself has.

    The tests of grading are not looked at.

    Raises:
        M1Error: The model's server refuses.
    """
    config = config or AgentlessConfig()
    tree = store.read("trees", instance.environment.tree)
    texts = {
        name: data.decode("utf-8", "replace")
        for name, data in tree.items()
        if is_source(name) and name.endswith(".py")
    }
    statement = instance.problem_statement
    files = locate_files(model, statement, texts, config)
    functions = locate_functions(model, statement, texts, files, config)
    prompt = _REPAIR.format(
        statement=statement, context=context_of(texts, files, functions, config.context_lines)
    )
    candidates = []
    for _ in range(config.num_repairs):
        patch = _as_patch(model.complete([Message("user", prompt)]), texts)
        if patch:
            candidates.append(patch)
    votes = Counter(candidates)
    kept, error = _unbroken(instance, list(votes), tree, store, backend, config)
    chosen = max(kept, key=lambda p: (votes[p], -len(p)), default="")
    return AgentlessResult(
        chosen, tuple(files), tuple(functions), len(candidates), len(votes), len(kept), error
    )


def locate_files(
    model: ChatModel, statement: str, texts: Mapping[str, str], config: AgentlessConfig
) -> list[str]:
    """Files that the model names, those that exist only."""
    prompt = _FILES.format(
        files="\n".join(sorted(texts)), statement=statement, count=config.num_files
    )
    named = _names(model.complete([Message("user", prompt)]))
    return [name for name in named if name in texts][: config.num_files]


def locate_functions(
    model: ChatModel,
    statement: str,
    texts: Mapping[str, str],
    files: Sequence[str],
    config: AgentlessConfig,
) -> list[str]:
    """Functions that the model names in these files, those that exist only."""
    if not files:
        return []
    outlines = "\n\n".join(f"{name}\n{outline(texts[name])}" for name in files)
    prompt = _ELEMENTS.format(statement=statement, outlines=outlines, count=config.num_functions)
    known = {f"{name}::{span[0]}" for name in files for span in function_spans(texts[name])}
    named = _names(model.complete([Message("user", prompt)]))
    return [name for name in named if name in known][: config.num_functions]


def outline(source: str) -> str:
    """Classes and functions of a file with their arguments, bodies left out."""
    lines = []

    def walk(node: ast.AST, depth: int) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                lines.append(f"{'    ' * depth}class {child.name}:")
                walk(child, depth + 1)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                lines.append(f"{'    ' * depth}def {child.name}({ast.unparse(child.args)})")

    try:
        walk(ast.parse(source), 0)
    except SyntaxError:
        return source[:2000]
    return "\n".join(lines[:_MAX_OUTLINE_LINES])


def context_of(
    texts: Mapping[str, str], files: Sequence[str], functions: Sequence[str], margin: int
) -> str:
    """The named functions with lines around them; whole files where no function is named."""
    parts = []
    for name in files:
        lines = texts[name].splitlines()
        spans = [s for s in function_spans(texts[name]) if f"{name}::{s[0]}" in functions]
        wanted = [(max(1, s[1] - margin), min(len(lines), s[2] + margin)) for s in spans]
        shown = _joined(wanted) or ([(1, len(lines))] if not functions else [])
        text = "\n...\n".join("\n".join(lines[first - 1 : last]) for first, last in shown)
        if text:
            parts.append(f"### {name}\n{text}")
    return "\n".join("\n\n".join(parts).splitlines()[:_MAX_CONTEXT_LINES])


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return found


def _names(reply: str) -> list[str]:
    """Texts of the last JSON array in a reply."""
    for found in reversed(re.findall(r"\[.*?\]", reply.rpartition("</think>")[2], re.DOTALL)):
        try:
            names = json.loads(found)
        except json.JSONDecodeError:
            continue
        return list(dict.fromkeys(n for n in names if isinstance(n, str)))
    return []


def _as_patch(reply: str, texts: Mapping[str, str]) -> str:
    """The reply's edits as a diff; empty when they cannot be made or change nothing that counts."""
    changed = dict(texts)
    try:
        for edit in parse_edits(reply):
            if edit.path not in changed:
                return ""
            changed[edit.path] = apply_edit(changed[edit.path], edit)
        for name, text in changed.items():
            if text != texts[name] and ast.dump(ast.parse(text)) == ast.dump(
                ast.parse(texts[name])
            ):
                changed[name] = texts[name]  # layout and comments only
    except (ActionError, SyntaxError, ValueError):
        return ""
    return tree_diff(
        {n: t.encode() for n, t in texts.items()}, {n: t.encode() for n, t in changed.items()}
    )


def _unbroken(
    instance: Instance,
    patches: Sequence[str],
    tree: Mapping[str, bytes],
    store: EnvironmentStore,
    backend: Backend,
    config: AgentlessConfig,
) -> tuple[list[str], str | None]:
    """Patches that break no test which passes without them, and what failed of ours.

    After a failure of ours all are kept.
    """
    tests = tests_of(tree)
    modules = sorted(filter(is_test_module, tests))
    if not modules or not patches:
        return list(patches), None

    def passing(patch: str) -> tuple[set[str], str | None]:
        run = run_suite(
            instance.environment,
            store,
            backend,
            patch=patch,
            tests=tests,
            files=modules,
            test_seconds=config.test_seconds,
        )
        return {test for test in run.tests if run.passed(test)}, run.infra_error

    before, error = passing("")
    kept = []
    for patch in patches:
        after, problem = passing(patch)
        error = error or problem
        if before <= after:
            kept.append(patch)
    return (list(patches) if error else kept), error
