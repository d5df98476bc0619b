"""`python -m images.lock`: what each image installs, each file by its hash.

uv resolves the extras of an image for its Python and platform; of every release one file is kept,
the wheel that pip would take, or the source where there is no wheel. No address is kept, so any
index serves.
"""

import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

PROJECT = Path(__file__).parents[1]
BACKENDS = ("hatchling", "pip", "setuptools", "wheel")
"""What builds our package and source releases; they are installed, so that no build fetches any."""


@dataclass(frozen=True)
class Install:
    """What one image installs from a package index."""

    extras: tuple[str, ...]
    python: tuple[int, int]
    glibc_minor: int
    """2.x of the base; wheels for newer ones cannot be taken."""
    pins: tuple[str, ...] = ()
    """In place of what constraints.txt says of the same packages."""


GPU_PINS = (
    "megatron-core==0.19.2",
    "torch==2.11.0",
    "transformer-engine==2.20.2",
    "triton==3.6.0",
)
"""What has run on GPUs; constraints.txt holds what runs on CPUs."""
INSTALLS = {
    "ops": Install(("ops",), python=(3, 11), glibc_minor=36),
    "inference": Install(("gpu", "serve"), python=(3, 12), glibc_minor=39, pins=GPU_PINS),
    "train": Install(
        ("gpu", "pipelines", "eval", "serve", "rewards", "swe"),
        python=(3, 12),
        glibc_minor=39,
        pins=GPU_PINS,
    ),
}


def resolve(install: Install) -> list[dict[str, Any]]:
    """The `packages` of a PEP 751 lock, made by uv."""
    version = ".".join(map(str, install.python))
    pinned = {pin.partition("==")[0] for pin in install.pins}
    constraints = [
        line
        for line in (PROJECT / "constraints.txt").read_text().splitlines()
        if line.partition("==")[0] not in pinned
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "constraints.txt").write_text("\n".join([*constraints, *install.pins]))
        (folder / "backends.in").write_text("\n".join(BACKENDS))
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-emit-package=m1"]
        command += [str(PROJECT / "pyproject.toml"), str(folder / "backends.in")]
        command += [f"--extra={extra}" for extra in install.extras]
        command += ["--constraints", str(folder / "constraints.txt"), f"--python-version={version}"]
        command += [f"--python-platform=x86_64-manylinux_2_{min(install.glibc_minor, 40)}"]
        command += ["--output-file", str(folder / "pylock.toml")]
        subprocess.run(command, check=True, cwd=folder)
        packages: list[dict[str, Any]] = tomllib.loads((folder / "pylock.toml").read_text())[
            "packages"
        ]
    return packages


def tags_of(install: Install) -> dict[Tag, int]:
    """Tags that pip accepts in the image, the best first."""
    glibc = [f"manylinux_2_{minor}_x86_64" for minor in range(install.glibc_minor, 4, -1)]
    platforms = [*glibc, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    platforms.append("linux_x86_64")
    found = [*cpython_tags(install.python, platforms=platforms)]
    found += compatible_tags(install.python, f"cp{''.join(map(str, install.python))}", platforms)
    return {tag: rank for rank, tag in enumerate(found)}


def chosen(package: dict[str, Any], tags: dict[Tag, int]) -> tuple[str, bool]:
    """The hash of the file that is installed, and whether it is a wheel."""
    ranked = []
    for wheel in package.get("wheels", ()):
        file = wheel["url"].rpartition("/")[2].partition("#")[0].replace("%2B", "+")
        ranks = [tags[tag] for tag in parse_wheel_filename(file)[3] if tag in tags]
        if ranks:
            ranked.append((min(ranks), wheel["hashes"]["sha256"]))
    if ranked:
        return min(ranked)[1], True
    if "sdist" not in package:
        raise SystemExit(f"{package['name']} {package['version']} has no file for this platform")
    return package["sdist"]["hashes"]["sha256"], False


def lock(name: str) -> None:
    """Write requirements.txt (wheels) and source.txt (what has to be built) of an image."""
    install = INSTALLS[name]
    tags = tags_of(install)
    lines: dict[bool, list[str]] = {True: [], False: []}
    for package in resolve(install):
        digest, is_wheel = chosen(package, tags)
        requirement = f"{package['name']}=={package['version']} --hash=sha256:{digest}"
        lines[is_wheel].append(requirement)
    header = "# Made by `python -m images.lock`: one file of each release, for x86-64."
    for is_wheel, file in ((True, "requirements.txt"), (False, "source.txt")):
        (PROJECT / "images" / name / file).write_text("\n".join([header, *lines[is_wheel], ""]))


if __name__ == "__main__":
    for image in sys.argv[1:] or INSTALLS:
        lock(image)
