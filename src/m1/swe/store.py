"""Environments on disk: dependencies and trees in layers that instances share.

    sites/KEY/    installed dependencies, one folder for each set of requirements
    trees/KEY/    a faulty tree as one git commit; mounted copy-on-write
    tests/KEY/    the tests of grading, which no agent's sandbox sees
    blobs/        the files of trees and tests, which are hard links to these
    archives/     source releases as downloaded
    index.jsonl   the instances

Keys are digests of what is inside, so that equal layers exist once, and a folder is complete as
soon as it has its name.
"""

import compileall
import hashlib
import importlib.metadata
import json
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from m1.sandbox.store import give_to_sandbox
from m1.swe.releases import normal_name
from m1.types import M1Error

RUNNER_REQUIREMENTS = ("pytest>=8.3,<9.2", "time-machine>=2.16,<4")
"""What every site holds beside the package's own dependencies."""
_COMMIT_DATE = "2020-01-01T00:00:00+00:00"
_PIP_SECONDS = 600


class SiteError(M1Error):
    """Dependencies that cannot be installed as wheels."""


class EnvironmentStore:
    """A folder of layers; several processes may build in it at once."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.archives = self.root / "archives"

    def site(self, requirements: Iterable[str] = ()) -> str:
        """Key of the layer with these requirements and the runner's, built if absent.

        What is installed beside m1 is copied where it meets them all; otherwise pip fetches wheels,
        and wheels only, so that no code of a package runs here.

        Raises:
            SiteError: They cannot be met.
        """
        wanted = sorted({*RUNNER_REQUIREMENTS, *requirements})
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        key = _digest([version, *wanted])

        def fill(folder: Path) -> None:
            _install(wanted, folder)
            compileall.compile_dir(
                folder, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
            )
            found = sorted(
                f"{d.metadata['Name']}=={d.version}"
                for d in importlib.metadata.distributions(path=[str(folder)])
            )
            (folder / "m1-site.json").write_text(
                json.dumps({"python": version, "requirements": wanted, "installed": found})
            )

        self.layer("sites", key, fill)
        return key

    def tree(self, files: Mapping[str, bytes], executables: Iterable[str] = ()) -> tuple[str, str]:
        """Key of a tree and the commit it was imported as; the same files give the same commit."""
        marked = frozenset(executables)
        key = _digest(
            [f"{n}:{n in marked}:{hashlib.sha256(files[n]).hexdigest()}" for n in sorted(files)]
        )

        def fill(folder: Path) -> None:
            self._write(folder, files, marked)
            _commit(folder)

        path = self.layer("trees", key, fill)
        return key, _git(path, "rev-parse", "HEAD").strip()

    def tests(self, files: Mapping[str, bytes]) -> str:
        """Key of a set of test files."""
        key = _digest([f"{n}:{hashlib.sha256(files[n]).hexdigest()}" for n in sorted(files)])
        self.layer("tests", key, lambda folder: self._write(folder, files))
        return key

    def folder(self, kind: str, key: str) -> Path:
        """Where a layer lies.

        Raises:
            M1Error: It is not here.
        """
        path = self.root / kind / key
        if not key or not path.is_dir():
            raise M1Error(
                f"{self.root} has no layer {kind}/{key}; build its instances there first "
                "(m1 sandbox build)"
            )
        return path

    def read(self, kind: str, key: str) -> dict[str, bytes]:
        """All plain files of a layer but git's."""
        root = self.folder(kind, key)
        found = {}
        for folder, names, files in os.walk(root):
            names[:] = [n for n in names if n != ".git"]
            for name in files:
                path = Path(folder, name)
                if not path.is_symlink():
                    found[str(path.relative_to(root))] = path.read_bytes()
        return found

    def disk_use(self) -> dict[str, int]:
        """Bytes on disk by kind of layer, and in all; a blob counts once, as a blob."""
        found = dict.fromkeys(("archives", "blobs", "sites", "pythons", "trees", "tests"), 0)
        seen: set[tuple[int, int]] = set()
        for kind in found:
            for folder, _, names in os.walk(self.root / kind):
                for name in names:
                    state = os.lstat(Path(folder, name))
                    if (state.st_dev, state.st_ino) not in seen:
                        seen.add((state.st_dev, state.st_ino))
                        found[kind] += state.st_blocks * 512
        return {**found, "total": sum(found.values())}

    def _write(
        self, folder: Path, files: Mapping[str, bytes], executables: frozenset[str] = frozenset()
    ) -> None:
        """Lay out files as links to blobs, so that what trees share is stored once."""
        for name, data in files.items():
            is_executable = name in executables
            digest = hashlib.sha256(data).hexdigest() + "x" * is_executable
            blob = self.root / "blobs" / digest[:2] / digest
            if not blob.exists():
                blob.parent.mkdir(parents=True, exist_ok=True)
                part = blob.with_name(f".{digest}-{os.getpid()}-{threading.get_ident()}")
                part.write_bytes(data)
                part.chmod(0o755 if is_executable else 0o644)
                os.replace(part, blob)
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(blob, path)
            except OSError:  # too many links, or a filesystem without them
                shutil.copy2(blob, path)

    def layer(self, kind: str, key: str, fill: Callable[[Path], None]) -> Path:
        """A layer's folder, made by `fill` in a temporary one unless it is there."""
        path = self.root / kind / key
        if path.is_dir():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=path.parent))
        try:
            fill(made)
            made.chmod(0o755)
            give_to_sandbox(made)
            os.rename(made, path)
        except OSError:
            if not path.is_dir():  # another process was first otherwise
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return path


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _commit(folder: Path) -> None:
    """Import a tree as the only commit of a repository."""
    _git(folder, "init", "-q", "-b", "main")
    _git(folder, "config", "core.fileMode", "false")  # object stores keep no modes
    _git(folder, "add", "-A", "-f")
    _git(folder, "commit", "-q", "--allow-empty", "-m", "Import")
    for name in ("hooks", "logs", "branches", "description", "COMMIT_EDITMSG"):
        path = folder / ".git" / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _git(folder: Path, *arguments: str) -> str:
    who = {"NAME": "m1", "EMAIL": "m1@localhost", "DATE": _COMMIT_DATE}
    identity = {f"GIT_{r}_{k}": v for r in ("AUTHOR", "COMMITTER") for k, v in who.items()}
    settings = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    path = os.environ.get("PATH", "/usr/bin:/bin")
    command = ["git", "-c", "core.autocrlf=false", "-c", "safe.directory=*", *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            env={**identity, **settings, "PATH": path, "HOME": "/nonexistent", "TZ": "UTC"},
        )
    except FileNotFoundError:
        raise M1Error("git is absent, but trees are imported with it; apt install git") from None
    if done.returncode:
        raise M1Error(f"git {arguments[0]} failed: {done.stderr[-500:]}")
    return done.stdout


def _install(requirements: list[str], folder: Path) -> None:
    """Copy what is installed beside m1, whose versions are pinned; else ask pip for wheels."""
    found, missing = installed_closure(requirements)
    if not missing:
        copy_distributions(found, folder)
        return
    command = [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--no-compile"),
        *("--disable-pip-version-check", "--only-binary", ":all:", "--target", str(folder)),
        *requirements,
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_PIP_SECONDS
        )
        error = "" if done.returncode == 0 else done.stderr[-1500:].strip()
    except subprocess.TimeoutExpired:
        error = f"pip took more than {_PIP_SECONDS} s"
    if error:
        raise SiteError(
            f"{', '.join(missing)} is not installed here, and pip finds no wheels: {error}"
        )
    shutil.rmtree(folder / "bin", ignore_errors=True)


def installed_closure(
    requirements: Iterable[str],
) -> tuple[list[importlib.metadata.Distribution], list[str]]:
    """Installed packages that requirements ask for, all they need included; and what is not here.

    What only an extra asks for is left out.
    """
    waiting = [Requirement(text) for text in requirements]
    found: dict[str, importlib.metadata.Distribution] = {}
    missing = []
    while waiting:
        wanted = waiting.pop()
        name = str(canonicalize_name(wanted.name))
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            package = importlib.metadata.distribution(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(str(wanted))
            continue
        if not wanted.specifier.contains(package.version, prereleases=True):
            missing.append(f"{wanted} ({package.version} is here)")
        elif wanted.extras:
            missing.append(f"{wanted} (extras)")
        elif name not in found:
            found[name] = package
            waiting += [Requirement(text) for text in package.requires or ()]
    return list(found.values()), missing


def copy_distributions(packages: Iterable[importlib.metadata.Distribution], folder: Path) -> None:
    """Copy installed packages without their console scripts."""
    for package in packages:
        for file in package.files or ():
            source = Path(str(package.locate_file(file)))
            if ".." not in file.parts and "__pycache__" not in file.parts and source.is_file():
                target = folder / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


def requirements_of(metadata: Mapping[str, list[str]], *, package: str) -> list[str]:
    """What a package's metadata ask for, its extras for testing included."""
    wanted = []
    for text in metadata.get("Requires-Dist", []):
        try:
            found = Requirement(text)
        except InvalidRequirement:
            continue
        if normal_name(found.name) == normal_name(package):
            continue
        extras = ("", "test", "tests", "testing")
        if found.marker is None or any(found.marker.evaluate({"extra": e}) for e in extras):
            found.marker = None
            wanted.append(str(found))
    return sorted(set(wanted))
