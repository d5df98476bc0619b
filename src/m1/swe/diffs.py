"""Unified diffs: made from two trees, reversed, read for what they touch, refused when unsafe."""

import ast
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from unidiff.errors import UnidiffParseError
from unidiff.patch import PatchSet

from m1.types import M1Error

_HUNK = re.compile(r"^@@ -(\d+(?:,\d+)?) \+(\d+(?:,\d+)?) @@(.*)$")
_LINK_OR_MODULE = re.compile(
    r"^(?:new file mode|new mode|deleted file mode|index \S+) (?:120000|160000)\s*$", re.MULTILINE
)

_PLAIN_GIT = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}


class PatchError(M1Error):
    """A patch that is no unified diff, or that touches what no patch may touch."""


@dataclass(frozen=True)
class Touched:
    """What a patch changes."""

    files: frozenset[str]
    functions: frozenset[str]
    """`file::Class.function` of the old side; module-level changes count as the file alone."""


def tree_diff(old: Mapping[str, bytes], new: Mapping[str, bytes]) -> str:
    """Unified diff in git's form between two sets of files, by `git diff`."""
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    if not names:
        return ""
    with tempfile.TemporaryDirectory(prefix="m1-diff-") as folder:
        for side, files in (("a", old), ("b", new)):
            (Path(folder) / side).mkdir()
            for name in names:
                if name in files:
                    path = Path(folder) / side / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(files[name])
        command = ["git", "-c", "core.quotePath=false", "diff", "--no-index", "--no-prefix"]
        options = ["--no-renames", "--no-color", "--no-ext-diff", "--full-index", "--text"]
        found = subprocess.run(
            [*command, *options, "a", "b"],
            cwd=folder,
            capture_output=True,
            env={**os.environ, **_PLAIN_GIT},
            check=False,
        )
    if found.returncode not in (0, 1):
        raise M1Error(f"git diff failed: {found.stderr.decode(errors='replace')}; is git sound?")
    text = found.stdout.decode(errors="surrogateescape")
    # For a file on one side only git names that side twice.
    return re.sub(r"^diff --git [ab]/(.+) [ab]/\1$", r"diff --git a/\1 b/\1", text, flags=re.M)


def apply(patch: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files after a patch, by `git apply` on copies of those that it touches.

    Raises:
        PatchError: It is unsafe or does not apply.
    """
    names = {n for f in parse(patch) for n in (_stripped(f.source_file), _stripped(f.target_file))}
    names.discard("/dev/null")
    changed = dict(files)
    with tempfile.TemporaryDirectory(prefix="m1-apply-") as folder:
        for name in names & files.keys():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[name])
        done = subprocess.run(
            ["git", "apply", "--whitespace=nowarn", "-"],
            cwd=folder,
            input=patch.encode("utf-8", "surrogateescape"),
            capture_output=True,
            env={**os.environ, **_PLAIN_GIT, "GIT_CEILING_DIRECTORIES": str(Path(folder).parent)},
            check=False,
        )
        if done.returncode:
            raise PatchError(f"the patch does not apply: {done.stderr.decode(errors='replace')}")
        for name in names:
            path = Path(folder, name)
            changed.pop(name, None)
            if path.is_file():
                changed[name] = path.read_bytes()
    return changed


def reverse(patch: str) -> str:
    """The diff that undoes a diff.

    Raises:
        ValueError: It is no unified diff.
    """
    lines: list[str] = []
    removed: list[str] = []
    added: list[str] = []
    old = ""

    def flush() -> None:
        lines.extend([*added, *removed])
        added.clear()
        removed.clear()

    in_hunk = False
    for line in patch.splitlines():
        found = _HUNK.match(line)
        if found:
            flush()
            in_hunk = True
            lines.append(f"@@ -{found[2]} +{found[1]} @@{found[3]}")
        elif line.startswith(("diff ", "--- ")) and (not in_hunk or line.startswith("diff ")):
            flush()
            in_hunk = False
            old = line
            if line.startswith("diff "):
                lines.append(line)
        elif line.startswith("+++ ") and not in_hunk:
            lines += [f"--- {_other(line[4:], 'b/', 'a/')}", f"+++ {_other(old[4:], 'a/', 'b/')}"]
        elif in_hunk and line.startswith("-"):
            removed.append("+" + line[1:])
        elif in_hunk and line.startswith("+"):
            added.append("-" + line[1:])
        elif in_hunk and line.startswith("\\"):
            (removed if removed and not added else added or removed or lines).append(line)
        elif in_hunk:
            flush()
            lines.append(line)
        else:
            lines.append(_reversed_header(line))
    flush()
    if patch.strip() and not any(line.startswith("@@") for line in lines):
        raise ValueError("patch has no hunk, so it cannot be reversed")
    return "\n".join(lines) + "\n" if lines else ""


def _other(path: str, prefix: str, new_prefix: str) -> str:
    return new_prefix + path[len(prefix) :] if path.startswith(prefix) else path


def _reversed_header(line: str) -> str:
    for one, other in (("new file", "deleted file"), ("deleted file", "new file")):
        if line.startswith(f"{one} mode"):
            return other + line[len(one) :]
    found = re.match(r"^index ([0-9a-f]+)\.\.([0-9a-f]+)(.*)$", line)
    return f"index {found[2]}..{found[1]}{found[3]}" if found else line


def parse(patch: str) -> PatchSet:
    """The patch, read and found safe to apply inside a tree.

    Raises:
        PatchError: It does not parse, leaves the tree, touches `.git`, or makes links or
            submodules.
    """
    try:
        found = PatchSet(patch)
    except UnidiffParseError as error:
        raise PatchError(f"the patch is no unified diff: {error}; make it with git diff") from None
    if patch.strip() and not found:
        raise PatchError("the patch holds no change of a file; make it with git diff")
    for file in found:
        for name in (file.source_file, file.target_file):
            if name != "/dev/null":
                _require_inside(_stripped(name))
    if _LINK_OR_MODULE.search(patch):
        raise PatchError("the patch makes or changes a symbolic link or submodule, which no "
                         "solution needs; leave it out")  # fmt: skip
    return found


def _require_inside(name: str) -> None:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or ".git" in parts or "\0" in name or not parts:
        raise PatchError(f"the patch touches {name!r}, which is outside the tree; leave it out")


def _stripped(name: str) -> str:
    name = name.strip().strip('"')
    return name[2:] if name[:2] in ("a/", "b/") else name


def touched(patch: str, sources: Mapping[str, str]) -> Touched:
    """Files and functions that a patch changes.

    Args:
        patch: Unified diff against `sources`.
        sources: Text of files before the patch; functions are found in those given.

    Raises:
        PatchError: As `parse`.
    """
    files: set[str] = set()
    functions: set[str] = set()
    for file in parse(patch):
        is_new = file.source_file == "/dev/null"
        name = _stripped(file.target_file if is_new else file.source_file)
        files.add(name)
        spans = function_spans(sources.get(name, ""))
        for line in _changed_lines(file):
            inside = [s for s in spans if s[1] <= line <= s[2]]
            if inside:
                functions.add(f"{name}::{max(inside, key=lambda s: s[1])[0]}")
    return Touched(frozenset(files), frozenset(functions))


def _changed_lines(file: object) -> set[int]:
    """Line numbers of the old side; an insertion counts where it stands."""
    found: set[int] = set()
    for hunk in file:  # type: ignore[attr-defined]
        position = hunk.source_start
        for line in hunk:
            if line.is_added:
                found.add(max(position - 1, 1))
            else:
                if line.is_removed:
                    found.add(line.source_line_no)
                position += 1
    return found


def function_spans(source: str) -> list[tuple[str, int, int]]:
    """Qualified name, first and last line of every function; nothing where it is no Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    found: list[tuple[str, int, int]] = []

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}{child.name}"
                if not isinstance(child, ast.ClassDef):
                    first = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                    found.append((name, first, child.end_lineno or child.lineno))
                walk(child, f"{name}.")
            else:
                walk(child, prefix)

    walk(tree, "")
    return found
