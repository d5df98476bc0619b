"""Tests that prove they ran: each hands over a secret from the end of its own body.

A test's outcome is reported by pytest, in a process that also runs the code under test, and such
code can make pytest say anything. So the grader writes a call with a secret, new in every run,
behind the last statement of every test function, and a test counts as passed only if pytest says so
and its secret arrived while it ran. Who prints results, replaces pytest's functions, swallows
exceptions or leaves the process early never reaches that line.

The text is changed by inserting, so that comments and messages stay as they are, and line numbers
too unless a test ends with a compound statement.
"""

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_TEST = re.compile(r"^test", re.IGNORECASE)
_COMPOUND = (
    ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar,
    ast.Match, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef,
)  # fmt: skip


@dataclass(frozen=True)
class Proven:
    """A test file with secrets in it."""

    source: bytes
    secrets: Mapping[str, str]
    """Secret by qualified name of the function."""


def insert(source: bytes, *, function: str, secret: Callable[[], str]) -> Proven:
    """Put a call of `function` with a fresh secret at the end of every test function.

    Args:
        source: A Python file in UTF-8; anything else comes back unchanged, without secrets.
        function: Name of the builtin that takes secrets in this run.
        secret: Makes a new one, letters and digits only.
    """
    text = source.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
    try:
        text.decode("utf-8")
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return Proven(source, {})
    starts = [0]
    for line in text.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    secrets: dict[str, str] = {}
    edits: list[tuple[int, bytes]] = []
    for name, node in _tests(tree, ""):
        secrets[name] = secret()
        edits += _edits(node, text, starts, f'{function}("{secrets[name]}")'.encode())
    for offset, added in sorted(edits, reverse=True):
        text = text[:offset] + added + text[offset:]
    return Proven(text, secrets)


def _tests(node: ast.AST, prefix: str) -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Test functions of a module and its classes, with qualified names."""
    found: list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            if _TEST.match(child.name):
                found.append((f"{prefix}{child.name}", child))
        elif isinstance(child, ast.ClassDef):
            found += _tests(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.If | ast.Try | ast.With):
            found += _tests(child, prefix)
    return found


def _edits(
    node: ast.FunctionDef | ast.AsyncFunctionDef, text: bytes, starts: list[int], call: bytes
) -> list[tuple[int, bytes]]:
    """Byte offsets and what to insert there."""

    def begin(part: ast.stmt | ast.expr) -> int:
        return starts[part.lineno - 1] + part.col_offset

    def end(part: ast.stmt | ast.expr) -> int:
        assert part.end_lineno is not None and part.end_col_offset is not None
        return starts[part.end_lineno - 1] + part.end_col_offset

    edits = []
    for leaving in _returns(node):
        if leaving.value is None:
            edits.append((begin(leaving), call + b"; "))
        else:
            edits += [(begin(leaving.value), b"(("), (end(leaving.value), b"), " + call + b")[0]")]
    last = node.body[-1]
    if isinstance(last, ast.Return | ast.Raise):
        return edits
    if not isinstance(last, _COMPOUND):
        return [*edits, (end(last), b"; " + call)]
    assert last.end_lineno is not None
    indent = text[starts[last.lineno - 1] :][: last.col_offset]
    return [*edits, (starts[last.end_lineno] - 1, b"\n" + indent + call)]


def _returns(node: ast.AST) -> list[ast.Return]:
    """Return statements of a function itself, not of those inside it."""
    found: list[ast.Return] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Return):
            found.append(child)
        elif not isinstance(
            child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
        ):
            found += _returns(child)
    return found
