"""Shells that have entered a control group and given up root, waiting to become bubblewrap.

Moving a process into a group waits until every processor has passed a quiet point of the kernel (an
RCU grace period), which was two thirds of a sandbox's start. So each thread keeps one shell that
has this behind it; a command only sends it a line, and the next shell enters its group while the
command runs. A shell holds no file of the host but its pipes, and ends with the process that made
it. What was measured is in the README beside this file.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import threading
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from m1.sandbox import cgroup, seccomp
from m1.sandbox.base import MIB, Limits, SandboxError
from m1.sandbox.process import kill_group
from m1.sandbox.store import UNPRIVILEGED_ID

OPEN_FILES = 1024
FILE_BYTES = 256 * MIB
_OWN_PROCESSES = 4
"""What bubblewrap itself needs."""
_own = threading.local()

# Files to enter groups by, a line each; then the program to become.
_ENTER = r"""
IFS='
'
for group in $1; do echo 0 > "$group" || exit 125; done
shift
exec "$@"
"""


class Starter:
    """A shell in a group of its own; for one command, from the thread that made it.

    Its pipes are those of the command to come, so standard input carries the line first.
    """

    def __init__(self) -> None:
        self.group = cgroup.create()
        self.status, reported = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        descriptors = [reported]
        code = seccomp.program()
        if code is not None:
            descriptors.append(_filled(code))
        self.options = ["--json-status-fd", str(reported)]
        if code is not None:
            self.options += ["--seccomp", str(descriptors[1])]
        try:
            self.process = subprocess.Popen(
                _waiting(self.group),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                pass_fds=descriptors,
                env={},
            )
        except BaseException:
            os.close(self.status)
            if self.group is not None:
                self.group.remove()
            raise
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        arguments = (self.process, self.status, self.group, os.getpid())
        self._end = weakref.finalize(self, _end, *arguments)
        self._owner = os.getpid()

    @property
    def is_ready(self) -> bool:
        """Whether it can still be used; a fork of its owner cannot."""
        return self._owner == os.getpid() and self.process.poll() is None

    def become(self, command: Sequence[str], limits: Limits) -> None:
        """Bound the group and the shell, and have it execute a command.

        A shell that is gone says so by its status and its standard error.
        """
        memory = processes = None
        if self.group is not None:
            self.group.bound(memory_mib=limits.memory_mib, num_processes=limits.num_processes)
        else:
            # RLIMIT_NPROC counts all processes of a user, those of other sandboxes too.
            user = UNPRIVILEGED_ID if os.geteuid() == 0 else os.getuid()
            processes = limits.num_processes + _OWN_PROCESSES + _running(user)
            memory = limits.memory_mib * 1024
        line = f"{_bounds(limits, memory, processes)}exec {shlex.join(command)}\n"
        rest = memoryview(os.fsencode(line))
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            while rest:
                rest = rest[os.write(self.process.stdin.fileno(), rest) :]

    def close(self) -> None:
        """Kill all that is left and remove the group; may be called twice."""
        self._end()


def take() -> Starter:
    """This thread's waiting shell, or a new one."""
    found: Starter | None = _own.__dict__.pop("starter", None)
    if found is not None and found.is_ready:
        return found
    if found is not None:
        found.close()
    return Starter()


def prepare() -> None:
    """Have the shell for this thread's next command get ready."""
    if "starter" not in _own.__dict__:
        _own.starter = Starter()


def _end(
    process: subprocess.Popen[bytes], status: int, group: cgroup.Group | None, owner: int
) -> None:
    """Not a method: it must hold nothing of the starter that it ends."""
    if os.getpid() != owner:
        return
    for pipe in (process.stdin, process.stdout, process.stderr):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
    os.close(status)
    try:
        if group is not None:
            group.kill()
        if process.poll() is None:
            kill_group(process)
        process.wait()
    finally:
        if group is not None:
            group.remove()


def _waiting(group: cgroup.Group | None) -> list[str]:
    """The command of a shell that enters the group, drops root, and reads what to become.

    A program, not code between fork and exec: forking a process of gigabytes costs more than all
    the rest, and starting a program does not copy it.
    """
    entrances = "\n".join(group.entrances) if group is not None else ""
    command = ["/bin/sh", "-c", _ENTER, "sh", entrances]
    if os.geteuid() == 0:
        command += [_find_setpriv(), "--reuid", str(UNPRIVILEGED_ID)]
        # bubblewrap asks for the signal too, a few milliseconds later.
        command += ["--regid", str(UNPRIVILEGED_ID), "--clear-groups", "--pdeathsig", "KILL", "--"]
    return [*command, "/bin/sh"]


def _bounds(limits: Limits, memory_kib: int | None, num_processes: int | None) -> str:
    """Shell text; a bound that cannot be set is above a stricter one that holds already."""
    cpu = max(1, int(-(-limits.cpu_seconds // 1)))
    text = f"{{ ulimit -c 0; ulimit -S -t {cpu}; ulimit -H -t {cpu + 1}; "
    text += f"ulimit -f {FILE_BYTES // 512}; ulimit -n {OPEN_FILES}; }} 2>/dev/null; "
    if memory_kib is not None:
        text += f"ulimit -v {memory_kib}; "
    if num_processes is not None:
        number = num_processes
        text += f"(ulimit -u {number}) 2>/dev/null && ulimit -u {number} || ulimit -p {number}; "
    return text


def _filled(code: bytes) -> int:
    """A descriptor at the start of the seccomp filter."""
    descriptor = os.memfd_create("m1-seccomp")
    os.write(descriptor, code)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


@cache
def _find_setpriv() -> str:
    found = shutil.which("setpriv", path="/usr/bin:/bin:/usr/sbin:/sbin")
    if found is None:
        raise SandboxError("setpriv is absent, by which root is dropped; apt install util-linux")
    return found


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
