"""What the files of a release are: tests, sources, or neither."""

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from m1.swe.inside.trees import STEERING, TEST_FOLDERS, is_test, steers

__all__ = ["STEERING", "TEST_FOLDERS", "is_source", "is_test", "python_path", "steers", "tests_of"]

_ASIDE = frozenset(
    {
        "doc", "docs", "example", "examples", "benchmark", "benchmarks", "bench", "scripts",
        "tools", "requirements", "ci", ".github", "utils", "extras", "demo", "demos", "perf",
    }
)  # fmt: skip
_ROOT_SCRIPTS = frozenset(
    {"setup.py", "noxfile.py", "tasks.py", "fabfile.py", "manage.py", "run.py", "ez_setup.py"}
)
_TEXTS = (".md", ".rst", ".txt", ".lock", ".yml", ".yaml", ".cfg", ".ini", ".in")


def is_source(path: str) -> bool:
    """Whether a file belongs to the package itself, so that a solution may change it."""
    parts = PurePosixPath(path).parts
    if is_test(path) or path in _ROOT_SCRIPTS or parts[-1] in STEERING:
        return False
    if parts[0].lower() in _ASIDE or any(p.endswith((".egg-info", ".dist-info")) for p in parts):
        return False
    if len(parts) == 1:
        return path.endswith(".py")
    return not path.lower().endswith(_TEXTS)


def tests_of(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a release's tests."""
    return {name: data for name, data in files.items() if is_test(name)}


def python_path(names: Iterable[str]) -> tuple[str, ...]:
    """Folders that hold the importable packages: `src` or `lib` where used, else the top."""
    folders = [
        top
        for top in ("src", "lib")
        if any(n.startswith(f"{top}/") and n.endswith(".py") for n in names)
    ]
    return tuple(folders) or (".",)
