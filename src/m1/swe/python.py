"""The interpreter that local sandboxes run tests with."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from m1.types import M1Error

if TYPE_CHECKING:
    from m1.swe.store import EnvironmentStore

_INSIDE = "/opt/python"
_LEFT_OUT = ("site-packages", "__pycache__", "test", "tests", "idlelib", "tkinter", "ensurepip")


@dataclass(frozen=True)
class Interpreter:
    """How to start Python inside, and what must be mounted for it."""

    command: tuple[str, ...]
    mounts: Mapping[str, Path] = field(default_factory=dict)


def interpreter(store: "EnvironmentStore") -> Interpreter:
    """The system's Python where it is of m1's version; else a copy of m1's own, made once.

    Sandboxes see this machine's /usr, so the system's costs nothing.
    """
    system = _system_python()
    return Interpreter((system,)) if system else _copied(store)


@cache
def _system_python() -> str | None:
    name = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    if not os.access(name, os.X_OK):
        return None
    check = "import ctypes, json, unittest.mock, sqlite3"
    done = subprocess.run([name, "-I", "-S", "-c", check], capture_output=True, check=False)
    return name if done.returncode == 0 else None


def _copied(store: "EnvironmentStore") -> Interpreter:
    version = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"

    def fill(folder: Path) -> None:
        base = Path(sys.base_prefix)
        library = f"python{sys.version_info.major}.{sys.version_info.minor}"
        source = base / "lib" / library
        if not source.is_dir():
            raise M1Error(f"{source} is no folder, so Python cannot be copied into sandboxes; "
                          "install the system's python3 of this version")  # fmt: skip
        (folder / "bin").mkdir()
        shutil.copy2(os.path.realpath(sys.executable), folder / "bin" / "python3")
        ignored = shutil.ignore_patterns(*_LEFT_OUT)
        shutil.copytree(source, folder / "lib" / library, ignore=ignored, symlinks=True)
        for shared in (base / "lib").glob("libpython*.so*"):
            shutil.copy2(shared, folder / "lib" / shared.name, follow_symlinks=False)

    path = store.layer("pythons", version, fill)
    command = ("/usr/bin/env", f"LD_LIBRARY_PATH={_INSIDE}/lib", f"{_INSIDE}/bin/python3")
    return Interpreter(command, {_INSIDE: path})
