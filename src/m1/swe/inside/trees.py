"""The tree inside: a patch applied, what could steer the tests removed, tests put in."""

import base64
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable

TEST_FOLDERS = frozenset({"test", "tests"})
STEERING = frozenset(
    {
        "conftest.py", "sitecustomize.py", "usercustomize.py", "pytest.ini", ".pytest.ini",
        "pytest.toml", ".pytest.toml", "tox.ini", "setup.cfg", "pyproject.toml", "PKG-INFO",
    }
)  # fmt: skip


def apply_patch(patch):
    """Apply a unified diff with git; nothing of the tree runs."""
    variables = {
        "PATH": "/usr/bin:/bin",
        "HOME": "/nonexistent",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        "GIT_CEILING_DIRECTORIES": os.path.dirname(os.getcwd()),
    }
    error = ""
    for options in ([], ["--recount"]):
        command = ["git", "-c", "safe.directory=*", "apply", "--whitespace=nowarn", *options, "-"]
        try:
            done = subprocess.run(
                command,
                input=patch.encode("utf-8", "surrogateescape"),
                capture_output=True,
                env=variables,
                check=False,
            )
        except OSError as problem:
            return {"is_applied": False, "error": f"git: {problem}", "is_ours": True}
        if done.returncode == 0:
            return {"is_applied": True, "error": ""}
        error = error or done.stderr.decode("utf-8", "replace")[-2000:]
    return {"is_applied": False, "error": error}


def prepare(job):
    """Remove what could steer the tests, then put the tests of grading in place."""
    for folder, names, files in os.walk("."):
        names[:] = [n for n in names if n != ".git"]
        for name in [n for n in names if n == "__pycache__" or os.path.islink(_join(folder, n))]:
            _remove(_join(folder, name))
            names.remove(name)
        for name in files:
            path = _join(folder, name)
            if is_test(path) or steers(path, job["python_path"], job["site"]):
                _remove(path)
    for path, (data, is_executable) in job["write"].items():
        _remove(path)
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))
        os.chmod(path, 0o755 if is_executable else 0o644)


def _join(folder, name):
    return os.path.normpath(os.path.join(folder, name))


def is_test(path: str) -> bool:
    """Whether a file of a tree belongs to its tests."""
    *folders, name = path.split("/")
    if TEST_FOLDERS.intersection(folders) or name == "conftest.py":
        return True
    stem, ending = os.path.splitext(name)
    return path == "test.py" or (  # below the top such a file may be the package's own
        ending == ".py" and (stem.startswith("test_") or stem.endswith("_test") or stem == "tests")
    )


def steers(path: str, python_path: Iterable[str], site: str) -> bool:
    """Whether a file can change how tests run without being one of them.

    Settings of pytest, hooks of the interpreter and of installed packages, compiled modules, and
    modules that would stand before those of the standard library or the runner.
    """
    parts = path.split("/")
    name = parts[-1]
    if name in STEERING or name.endswith((".pth", ".pyc", ".so", ".pyd", ".egg-link")):
        return True
    if any(part.endswith((".egg-info", ".dist-info")) for part in parts):
        return True
    for root in {"", *("" if r == "." else r for r in python_path)}:
        if root and not path.startswith(root + "/"):
            continue
        rest = path[len(root) + 1 :] if root else path
        top, _, below = rest.partition("/")
        module = top if below else top[: -len(".py")] if top.endswith(".py") else None
        if module is not None and (
            module in sys.stdlib_module_names
            or os.path.exists(os.path.join(site, module))
            or os.path.exists(os.path.join(site, module + ".py"))
        ):
            return True
    return os.path.islink(path)


def _remove(path):
    with contextlib.suppress(OSError):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
