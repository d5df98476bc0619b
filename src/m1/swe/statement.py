"""Problem statements from a release's changelog and the tests that fail, without the solution."""

import re
from collections.abc import Iterable, Sequence

from m1.swe.diffs import parse
from m1.swe.releases import Release
from m1.swe.suite import SuiteRun

_CHANGELOG = re.compile(
    r"^(?:docs?/(?:\w+/)?)?(?:changes|changelog|history|news|releases?|release[_-]notes|whatsnew)"
    r"(?:\.\w+)?$",
    re.IGNORECASE,
)
_VERSION = re.compile(r"(?<![\w.])v?(\d+\.\d+(?:\.\d+)*)(?![\w])")
_LEADING = re.compile(
    r"^[\s#*=\-\[(]*(?:(?:version|release|changes|what'?s|new|in|for|notes|tag)\s+)*[:\[v]*\s*",
    re.IGNORECASE,
)
"""What may stand before the version in a heading."""
_MAX_CHARACTERS = 4000
_MAX_TESTS = 5
_SHORTEST_LEAK = 8


def problem_statement(fix: Release, gold: str, base_run: SuiteRun, failing: Sequence[str]) -> str:
    """What the newer release says was wrong, and what its tests see on the older one.

    Lines that hold a line the gold patch adds are left out.
    """
    parts = []
    entry = changelog_entry(fix.files, fix.sdist.version)
    if entry:
        parts.append(f"The next release's notes say:\n\n{entry}")
    parts.append(observations(failing, base_run))
    title = f"{fix.sdist.package}: behaviour to mend"
    return without_leaks("\n\n".join([title, *parts]), gold)[:_MAX_CHARACTERS].rstrip() + "\n"


def observations(failing: Sequence[str], base_run: SuiteRun) -> str:
    """What the failing tests see, without their text: their names in words and their errors."""
    seen = [_observation(test, base_run) for test in failing[:_MAX_TESTS]]
    if len(failing) > _MAX_TESTS:
        seen.append(f"- and {len(failing) - _MAX_TESTS} more likewise.")
    return "\n".join(["What goes wrong now:", "", *seen])


def changelog_entry(files: dict[str, bytes], version: str) -> str:
    """The section of a version in the changelog, or in the description; empty when there is none.

    A section begins at a short line that names the version and ends before one that names another.
    """
    named = sorted(filter(_CHANGELOG.match, files), key=len)
    for name in [*named, "PKG-INFO", *(n for n in files if n.lower().startswith("readme"))]:
        text = files.get(name, b"").decode(errors="replace")
        lines = text.splitlines()
        for number, line in enumerate(lines):
            if _heads(line, version):
                found = _section(lines[number + 1 :], line, version)
                if found:
                    return found
    return ""


def _heads(line: str, version: str) -> bool:
    if len(line) > 120 or line.startswith(("Version:", "Metadata-Version:", " " * 8)):
        return False
    versions = _VERSION.findall(line)
    return version in versions[:1] and _LEADING.sub("", line).startswith(version)


def _section(lines: Sequence[str], heading: str, version: str) -> str:
    kept = []
    if ":" in heading or heading.lstrip().startswith(("-", "*")):  # `- 1.2.3 Mend this`
        kept.append(heading.strip())
    for line in lines:
        found = _VERSION.findall(line)
        bare = _LEADING.sub("", line)
        if found and found[0] != version and bare.startswith(found[0]):
            break
        if not re.fullmatch(r"[\s=\-~^*#+.]*", line):
            kept.append(line.rstrip())
        if sum(map(len, kept)) > _MAX_CHARACTERS // 2:
            break
    return "\n".join(kept).strip()


def _observation(test: str, run: SuiteRun) -> str:
    name = test.rpartition("::")[2]
    words = name.partition("[")[0].removeprefix("test").strip("_").replace("_", " ")
    found = run.tests.get(test)
    if found is None:
        reason = next((_last_error(e) for e in run.errors), "its tests cannot be imported")
        return f"- {words}: {reason}"
    if found.outcome in ("timeout", "crash"):
        return f"- {words}: {'it does not end' if found.outcome == 'timeout' else 'it crashes'}"
    return f"- {words}: {_last_error(found.message)}"


def _last_error(message: str) -> str:
    lines = [line[1:].strip() for line in message.splitlines() if re.match(r"E\s", line)]
    if not lines:
        lines = [line.strip() for line in message.splitlines() if line.strip()][-1:]
    return " / ".join(lines[:4])[:400] or "it fails"


def without_leaks(text: str, gold: str) -> str:
    """The text without lines in which a line that the patch adds can be found."""
    added = {_squeezed(line) for line in added_lines(gold)}
    leaks = {line for line in added if len(line) >= _SHORTEST_LEAK and not line.isalpha()}
    kept = [
        line for line in text.splitlines() if not any(leak in _squeezed(line) for leak in leaks)
    ]
    return "\n".join(kept)


def added_lines(patch: str) -> Iterable[str]:
    """Text of every line that a patch adds."""
    return [line.value for file in parse(patch) for hunk in file for line in hunk if line.is_added]


def _squeezed(line: str) -> str:
    return re.sub(r"\s+", "", line)
