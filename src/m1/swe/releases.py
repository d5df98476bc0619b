"""Source releases of packages: found and fetched through a package index, checked, read as data.

Nothing of a package runs here: archives are read member by member, and no build is started.
"""

import bisect
import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import Parser
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from m1.types import M1Error

if TYPE_CHECKING:
    from pypi_simple import DistributionPackage, PyPISimple

_MAX_ARCHIVE_BYTES = 64 << 20
_MAX_FILES = 20_000
_TIMEOUT_SECONDS = 60.0


class IndexUnreachable(M1Error):
    """The package index does not answer; what needs it cannot be done now."""


class ReleaseError(M1Error):
    """A release that is missing, altered or no archive of plain files."""


@dataclass(frozen=True)
class Sdist:
    """One source release as an index lists it."""

    package: str
    version: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Release:
    """The files of a source release, without the archive's top folder."""

    sdist: Sdist
    files: dict[str, bytes]
    executables: frozenset[str] = frozenset()

    @cached_property
    def metadata(self) -> dict[str, list[str]]:
        """Fields of PKG-INFO, each with all its values."""
        message = Parser().parsestr(self.files.get("PKG-INFO", b"").decode(errors="replace"))
        return {name: [str(v) for v in message.get_all(name, [])] for name in set(message.keys())}

    @property
    def license(self) -> str:
        """What the metadata say of the licence; empty when nothing."""
        fields = self.metadata
        said = fields.get("License-Expression") or [
            text.splitlines()[0][:100] for text in fields.get("License", []) if text.strip()
        ]
        marks = [c for c in fields.get("Classifier", []) if c.startswith("License ::")]
        return "; ".join([*said, *(c.removeprefix("License :: ") for c in marks)])


class PackageIndex:
    """The index that pip uses, and a folder of downloaded archives."""

    def __init__(self, folder: Path, *, url: str | None = None) -> None:
        """Connect lazily, and only then import pypi_simple, which takes half a second.

        Args:
            folder: Where archives are kept.
            url: Simple index; absent: pip's setting, or the public one.
        """
        self._folder = folder
        self._url = url or _pip_index()
        self._listed: dict[str, dict[str, DistributionPackage]] = {}

    def versions(self, package: str) -> list[str]:
        """Versions with a source archive, oldest first, final releases only.

        Raises:
            IndexUnreachable: The index does not answer.
            ReleaseError: It has no such package.
        """
        found = self._list(package)
        return sorted((v for v in found if _is_final(v)), key=Version)

    def fetch(self, package: str, version: str, *, sha256: str | None = None) -> Release:
        """Download (once) and read a source release.

        Args:
            package: Name on the index.
            version: Exact version.
            sha256: What the archive must have; absent: what the index says.

        Raises:
            IndexUnreachable: The index does not answer and the archive is not here yet.
            ReleaseError: There is no such archive, or its digest differs.
        """
        known = self._kept(sha256)
        if known is not None and sha256 is not None:
            return read_archive(known, Sdist(package, version, known.name, sha256))
        listed = self._list(package).get(version)
        if listed is None:
            near = self._near(package, version)
            raise ReleaseError(f"{package} {version} has no source archive on the index; {near}")
        said = listed.digests.get("sha256", "")
        if sha256 is not None and said and said != sha256:
            raise ReleaseError(
                f"{listed.filename} has sha256 {said} on the index, but {sha256} was asked for; "
                "it is not the same file, so correct the pair"
            )
        path = self._folder / (sha256 or said)[:16] / listed.filename
        if not path.exists():
            self._download(listed, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != (sha256 or said or digest):
            path.unlink()
            raise ReleaseError(
                f"{listed.filename} has sha256 {digest}, not {sha256 or said}; it was altered on "
                "the way, try again"
            )
        return read_archive(path, Sdist(package, version, listed.filename, digest))

    def _near(self, package: str, version: str) -> str:
        """What to name in place of a version that is not there."""
        there = self.versions(package)
        try:
            at = bisect.bisect([Version(v) for v in there], Version(version))
        except InvalidVersion:
            at = len(there)
        near = ", ".join(there[max(0, at - 3) : at + 3])
        return f"name one that has, such as {near}" if near else "no version of it has one"

    def _kept(self, sha256: str | None) -> Path | None:
        folder = self._folder / (sha256 or "-")[:16]
        for path in folder.glob("*") if folder.is_dir() else ():
            if hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
                return path
        return None

    def _list(self, package: str) -> dict[str, "DistributionPackage"]:
        from pypi_simple import NoSuchProjectError
        from requests import RequestException

        if package not in self._listed:
            try:
                with self._client() as client:
                    page = client.get_project_page(package, timeout=_TIMEOUT_SECONDS)
            except NoSuchProjectError:
                raise ReleaseError(
                    f"the index has no package {package!r}; check its name"
                ) from None
            except RequestException as error:
                raise _unreachable(error) from error
            self._listed[package] = {
                p.version: p
                for p in page.packages
                if p.package_type == "sdist" and p.version and not p.is_yanked
            }
        return self._listed[package]

    def _client(self) -> "PyPISimple":
        from pypi_simple import PYPI_SIMPLE_ENDPOINT, PyPISimple

        return PyPISimple(self._url or PYPI_SIMPLE_ENDPOINT)

    def _download(self, listed: "DistributionPackage", path: Path) -> None:
        from pypi_simple import DigestMismatchError
        from requests import RequestException

        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            with self._client() as client:
                client.download_package(listed, part, timeout=_TIMEOUT_SECONDS)
        except DigestMismatchError as error:
            raise ReleaseError(f"{listed.filename} was altered on the way: {error}") from error
        except RequestException as error:
            raise _unreachable(error) from error
        os.replace(part, path)


def read_archive(path: Path, sdist: Sdist) -> Release:
    """Files of a .tar.gz or .zip source archive, links and devices left out.

    Raises:
        ReleaseError: It is no such archive, too large, or names files outside its folder.
    """
    files: dict[str, bytes] = {}
    executables = set()
    total = 0
    try:
        for name, data, is_executable in _members(path):
            parts = PurePosixPath(name).parts
            if name.startswith("/") or ".." in parts:
                raise ReleaseError(f"{path.name} names {name!r}, outside its folder; refused")
            total += len(data)
            if total > _MAX_ARCHIVE_BYTES or len(files) > _MAX_FILES:
                raise ReleaseError(
                    f"{path.name} unpacks to more than {_MAX_ARCHIVE_BYTES >> 20} MiB or "
                    f"{_MAX_FILES} files; too large for a task"
                )
            if len(parts) > 1:
                inner = str(PurePosixPath(*parts[1:]))
                files[inner] = data
                if is_executable:
                    executables.add(inner)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise ReleaseError(f"{path.name} cannot be read as an archive: {error}") from error
    if not files:
        raise ReleaseError(f"{path.name} holds no files in a top folder; not a source release")
    return Release(sdist, files, frozenset(executables))


def _members(path: Path) -> Iterator[tuple[str, bytes, bool]]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir() and info.file_size <= _MAX_ARCHIVE_BYTES:
                    yield info.filename, archive.read(info), bool(info.external_attr >> 16 & 0o100)
        return
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.size <= _MAX_ARCHIVE_BYTES:
                file = archive.extractfile(member)
                assert file is not None
                yield member.name, file.read(), bool(member.mode & 0o100)


def normal_name(package: str) -> str:
    """A package's name as indexes write it."""
    return str(canonicalize_name(package))


def is_older(version: str, other: str) -> bool:
    """Whether a version comes before another; True where one of them is none, for the index."""
    try:
        return Version(version) < Version(other)
    except InvalidVersion:
        return True


def _is_final(version: str) -> bool:
    try:
        parsed = Version(version)
    except InvalidVersion:
        return False
    return not parsed.is_prerelease and not parsed.is_devrelease


def _pip_index() -> str | None:
    """The index in pip's settings; None for the public one."""
    if os.environ.get("PIP_INDEX_URL"):
        return os.environ["PIP_INDEX_URL"]
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None if found.returncode == 0 else None


def _unreachable(error: Exception) -> IndexUnreachable:
    return IndexUnreachable(
        f"the package index does not answer ({type(error).__name__}); set PIP_INDEX_URL to one "
        "that does, or work with what is already built"
    )
