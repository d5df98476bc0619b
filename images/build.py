"""`python -m images.build NAME`: build one image with podman or docker, and push and pin it.

    python -m images.build ops --repository registry.example.org/m1/ops --push
    python -m images.build --pin                      # manifests/images from images.lock.json

`--push` writes the digest that the registry answered into images.lock.json, from which the
manifests take it. `--option` passes anything else to the engine.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1]
LOCK = PROJECT / "images" / "images.lock.json"
COMPONENT = PROJECT / "manifests" / "images" / "kustomization.yaml"
IMAGES = ("inference", "ops", "sandbox", "train")


def read_lock() -> dict[str, Any]:
    """images.lock.json."""
    lock: dict[str, Any] = json.loads(LOCK.read_text())
    return lock


def build(name: str, tag: str, *, engine: str, options: list[str]) -> None:
    """Build the image of `images/NAME` as `tag`; HEALTHCHECK needs Docker's format."""
    git = ["git", "-C", str(PROJECT), "rev-parse", "HEAD"]
    revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    command = [engine, "build", "--file", str(PROJECT / "images" / name / "Containerfile")]
    command += ["--build-arg", f"REVISION={revision}", "--tag", tag]
    command += ["--format", "docker"] if engine.endswith("podman") else []
    subprocess.run([*command, *options, str(PROJECT)], check=True)


def push(tag: str, *, engine: str) -> str:
    """Push, and return the digest by which the registry knows the image."""
    if not engine.endswith("podman"):
        subprocess.run([engine, "push", tag], check=True)
        asked = [engine, "inspect", "--format", "{{index .RepoDigests 0}}", tag]
        found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        return found.strip().partition("@")[2]
    with tempfile.NamedTemporaryFile() as file:
        subprocess.run([engine, "push", "--digestfile", file.name, tag], check=True)
        return Path(file.name).read_text().strip()


def pin() -> str:
    """The kustomize component that gives the manifests' image names their places and digests."""
    lock = read_lock()
    lines = [
        "# Made by `python -m images.build --pin` from images/images.lock.json.",
        "apiVersion: kustomize.config.k8s.io/v1alpha1",
        "kind: Component",
        "images:",
    ]
    for name, entry in sorted({**lock["services"], **lock["built"]}.items()):
        lines += [f"  - name: {name}", f"    newName: {entry['image']}"]
        # Ours have no digest until they are pushed somewhere.
        digest = entry["digest"]
        lines.append(f"    digest: {digest}" if digest else "    newTag: unpushed")
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("image", nargs="?", choices=IMAGES)
    parser.add_argument("--repository", help="absent: that of images.lock.json")
    parser.add_argument("--engine", default=shutil.which("podman") or shutil.which("docker"))
    parser.add_argument("--option", action="append", default=[], metavar="OPTION=VALUE")
    parser.add_argument("--push", action="store_true", help="push, and write the digest down")
    parser.add_argument("--pin", action="store_true", help="write manifests/images")
    given = parser.parse_args(arguments)
    if given.image:
        if given.engine is None:
            sys.exit("there is neither podman nor docker; install one, or name it with --engine")
        lock = read_lock()
        entry = lock["built"][f"m1-{given.image}"]
        repository = given.repository or entry["image"]
        build(given.image, repository, engine=given.engine, options=given.option)
        if given.push:
            entry.update(image=repository, digest=push(repository, engine=given.engine))
            LOCK.write_text(json.dumps(lock, indent=2) + "\n")
    if given.pin or given.push:
        COMPONENT.write_text(pin())


if __name__ == "__main__":
    main()
