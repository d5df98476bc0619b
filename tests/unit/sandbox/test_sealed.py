import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from m1.sandbox import bubblewrap, cgroup, seccomp
from m1.sandbox.base import MIB, Limits, SandboxError
from m1.sandbox.opening import open_sealed
from m1.sandbox.sealed import SealedBubblewrap
from m1.sandbox.unprotected import UnprotectedProcess

needs_bubblewrap = pytest.mark.skipif(
    bubblewrap.failure() is not None, reason=f"no sandbox here: {bubblewrap.failure()}"
)
PYTHON = ["/usr/bin/python3", "-I", "-S", "/work/p.py"]


@pytest.fixture
def sandbox():
    with SealedBubblewrap(limits=Limits(cpu_seconds=5, wall_seconds=20, memory_mib=256)) as opened:
        yield opened


def run(sandbox, source, **options):
    sandbox.write_file("p.py", source.encode())
    return sandbox.exec(PYTHON, **options)


@needs_bubblewrap
def test_input_output_and_status_pass_through(sandbox):
    source = "import sys\nprint(sys.stdin.read().upper())\nsys.stderr.write('e')\nsys.exit(7)"
    result = run(sandbox, source, stdin=b"abc")
    assert (result.stdout, result.stderr, result.exit_code) == (b"ABC\n", b"e", 7)
    assert result.stopped_by is None


@needs_bubblewrap
def test_a_megabyte_passes_both_ways_at_once(sandbox):
    data = os.urandom(1 << 20)
    source = "import sys, shutil\nshutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer)"
    assert run(sandbox, source, stdin=data).stdout == data


@needs_bubblewrap
def test_nothing_survives_from_one_command_to_the_next(sandbox):
    run(sandbox, "open('/tmp/x', 'w').write('x')")
    assert run(sandbox, "import os\nprint(os.listdir('/tmp'))").stdout == b"[]\n"


@needs_bubblewrap
def test_only_the_given_environment_is_seen(sandbox):
    os.environ["M1_SECRET"] = "s"
    try:
        result = run(sandbox, "import os\nprint(sorted(os.environ))", environment={"LEVEL": "1"})
    finally:
        del os.environ["M1_SECRET"]
    assert b"LEVEL" in result.stdout
    assert b"SECRET" not in result.stdout


@needs_bubblewrap
def test_what_a_program_prints_cannot_pass_for_a_failure_of_ours(sandbox):
    assert run(sandbox, "import sys\nsys.exit('bwrap: no')").exit_code == 1


@needs_bubblewrap
@pytest.mark.parametrize(
    ("source", "limit"),
    [
        ("import time\ntime.sleep(60)", "wall"),
        ("while True: pass", "cpu"),
        ("import sys\nwhile True: sys.stdout.write('x' * 65536)", "output"),
        pytest.param(
            "x = bytearray(500 << 20)",
            "memory",
            marks=pytest.mark.skipif(not cgroup.version(), reason="no control group"),
        ),
    ],
)
def test_the_limit_that_ends_a_program_is_named(sandbox, source, limit):
    wall = 2 if limit == "wall" else 60  # busy neighbours make the other limits late
    limits = Limits(cpu_seconds=0.5, wall_seconds=wall, memory_mib=128, output_bytes=MIB)
    result = run(sandbox, source, limits=limits)
    assert result.stopped_by == limit
    assert len(result.stdout) <= MIB


@needs_bubblewrap
@pytest.mark.parametrize("name", ["../x", "a/b", "", ".."])
def test_file_names_cannot_leave_the_folder(sandbox, name):
    with pytest.raises(ValueError, match="one plain name"):
        sandbox.write_file(name, b"")


@needs_bubblewrap
def test_a_closed_sandbox_refuses_and_has_no_folder():
    opened = SealedBubblewrap()
    folder = opened._folder
    opened.close()
    opened.close()
    assert not folder.exists()
    with pytest.raises(SandboxError, match="closed"):
        opened.exec(["true"])


def test_without_bubblewrap_untrusted_programs_are_refused(monkeypatch):
    monkeypatch.setattr(bubblewrap, "failure", lambda: "bubblewrap (bwrap) is absent")
    with pytest.raises(
        SandboxError, match="untrusted programs cannot be isolated here: bubblewrap"
    ):
        open_sealed()
    with open_sealed(is_trusted=True) as opened:
        assert isinstance(opened, UnprotectedProcess)
        opened.write_file("p.py", b"print(input())")
        assert opened.exec(PYTHON, stdin=b"5\n").stdout == b"5\n"


def test_strict_opening_refuses_what_is_weaker_than_the_full_sandbox(monkeypatch):
    monkeypatch.setattr(bubblewrap, "failure", lambda: None)
    monkeypatch.setattr(bubblewrap, "weaknesses", lambda: ("no control group",))
    with pytest.raises(SandboxError, match="no control group"):
        open_sealed(is_strict=True)


@pytest.mark.skipif(not cgroup.version(), reason="no control group")
def test_groups_of_dead_owners_are_swept():
    group = cgroup.create(memory_mib=64, num_processes=4)
    entrance = Path(group.entrances[0]).parent
    cgroup.sweep()  # of tests that were killed
    try:
        assert cgroup.sweep() == 0
        assert entrance.exists()
    finally:
        group.remove()
    dead = 2**22 - 1
    kind = type(group)
    left = kind(f"m1-sandbox-{dead}-0")
    assert Path(left.entrances[0]).exists()
    assert cgroup.sweep() == 1
    assert not Path(left.entrances[0]).exists()


@pytest.mark.skipif(not cgroup.version(), reason="no control group")
def test_several_threads_may_sweep_the_same_groups():
    group = cgroup.create(memory_mib=64, num_processes=4)
    kind = type(group)
    group.remove()
    dead = 2**22 - 1
    for round_ in range(10):
        left = [kind(f"m1-sandbox-{dead}-{round_}{number}") for number in range(5)]
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _: cgroup.sweep(), range(4)))
        assert not any(Path(path).exists() for one in left for path in one.entrances)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_denies_listed_calls_and_kills_foreign_abis(machine):
    """A small interpreter of the five instructions that the filter uses."""
    code = seccomp.program(machine)
    steps = [struct.unpack_from("=HBBI", code, at) for at in range(0, len(code), 8)]
    native = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]

    def verdict(arch, number, family=1):
        position, value = 0, 0
        while True:
            kind, yes, no, operand = steps[position]
            position += 1
            if kind == 0x20:
                value = {0: number, 4: arch, 16: family}[operand]
            elif kind == 0x06:
                return operand
            else:
                holds = value == operand if kind == 0x15 else value >= operand
                position += yes if holds else no

    for number in seccomp.denied_calls(machine).values():
        assert verdict(native, number) == 0x00050001  # ERRNO(EPERM)
    assert verdict(native, 0) == 0x7FFF0000
    socket = {"x86_64": 41, "aarch64": 198}[machine]
    families = [family for family in range(64) if verdict(native, socket, family) == 0x7FFF0000]
    assert families == [1, 2, 10, 16]
    assert verdict(native, socket, 40) == 0x00050001  # vsock
    assert verdict(native, 0x40000000) == 0x80000000
    assert verdict(0x40000003, 0) == 0x80000000


def test_a_machine_without_a_table_has_no_filter():
    assert seccomp.program("riscv64") is None
