"""A box: bubblewrap around `m1.sandbox.zygote`, which forks a child for each command.

What keeps commands from each other is in the zygote; what is kept from one to the next is here:
the bubblewrap process, the control group, a socket. See `m1.sandbox.prepared`.
"""

import contextlib
import json
import os
import resource
import socket
import struct
import subprocess
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from m1.sandbox import bubblewrap, cgroup, seccomp, starter
from m1.sandbox.base import MIB, ExecResult, Limits, SandboxError
from m1.sandbox.process import Pipes, collect_pipes, kill_group

PYTHON = ("/usr/bin/python3", "-I", "-S")
"""How a command begins that the warm interpreter can take over; a script's path must follow."""
_ZYGOTE = Path(__file__).with_name("zygote.py")
_RIGHTS = ("CAP_SYS_ADMIN", "CAP_SYS_RESOURCE", "CAP_SETPCAP")
"""Within the box's own user namespace; the command itself has none."""
_HEADER = struct.Struct("!II")
_REPLY = struct.Struct("!idI")
_LINKS = {"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"}
_START_SECONDS = 60.0
_ANSWER_SECONDS = 10.0
_OWN_PROCESSES = 4
"""Bubblewrap's two, the zygote, and the init of the command's namespace."""


@dataclass(frozen=True)
class Command:
    """What one child of the zygote is to do."""

    words: tuple[str, ...]
    files: Mapping[str, tuple[bytes, int]]
    environment: Mapping[str, str]

    def message(self, limits: Limits, is_grouped: bool) -> bytes:
        """What the zygote reads: two sizes, the request, the files' bytes."""
        cpu = max(1, int(-(-limits.cpu_seconds // 1)))
        rlimits = [["RLIMIT_CPU", cpu, cpu + 1]]
        if not is_grouped:
            bound = limits.num_processes + _OWN_PROCESSES
            rlimits += [["RLIMIT_AS", limits.memory_mib * MIB, limits.memory_mib * MIB]]
            rlimits += [["RLIMIT_NPROC", bound, bound]]
        request = {
            "command": self.words,
            "script": self.words[3:] if self._is_script() else None,
            "environment": dict(self.environment),
            "files": [[name, len(data), mode] for name, (data, mode) in self.files.items()],
            "rlimits": rlimits,
            "scratch_bytes": limits.scratch_mib * MIB,
        }
        head = json.dumps(request).encode()
        data = b"".join(data for data, _ in self.files.values())
        return _HEADER.pack(len(head), len(data)) + head + data

    def _is_script(self) -> bool:
        """Whether the warm interpreter runs it; null bytes mean other things in files."""
        if self.words[:3] != PYTHON or len(self.words) < 4:
            return False
        folder, _, name = self.words[3].rpartition("/")
        return folder == "/work" and name in self.files and b"\0" not in self.files[name][0]


@dataclass
class _Running:
    """What a box holds outside, so that it can be put down without the box."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    errors: int
    group: cgroup.Group | None
    owner: int
    """The process that started it; a fork of that has the box's descriptors but not the box."""

    def end(self) -> None:
        """Kill everything inside and release what was held."""
        if os.getpid() != self.owner:
            return
        self.control.close()
        with contextlib.suppress(OSError):
            os.close(self.errors)
        try:
            if self.group is not None:
                self.group.kill()
            kill_group(self.process)
            self.process.wait()
        finally:
            if self.group is not None:
                self.group.remove()


class Box:
    """Bubblewrap with a zygote inside; for one thread, one command at a time."""

    def __init__(self, *, memory_mib: int, num_processes: int) -> None:
        program = bubblewrap.find_bubblewrap()
        if program is None:
            raise SandboxError("bubblewrap (bwrap) is absent; apt install bubblewrap")
        group = cgroup.create(
            memory_mib=memory_mib, num_processes=num_processes + _OWN_PROCESSES
        )  # fmt: skip
        self._running = _started(program, group)
        self._end = weakref.finalize(self, self._running.end)
        self.num_commands = 0
        try:
            self._running.control.sendall(_HEADER.pack(2, len(seccomp.program() or b"")) + b"{}")
            self._running.control.sendall(seccomp.program() or b"")
            self._answer(_START_SECONDS)
        except SandboxError:
            self.close()
            raise

    @property
    def is_open(self) -> bool:
        """Whether commands can be run."""
        is_ours = self._running.owner == os.getpid()
        return is_ours and self._end.alive and self._running.process.poll() is None

    def close(self) -> None:
        """Kill everything; may be called twice."""
        self._end()

    def run(self, command: Command, stdin: bytes, limits: Limits) -> ExecResult:
        """Run one command to its end or a limit; then the box is empty, or closed."""
        started = time.monotonic()
        running, self.num_commands = self._running, self.num_commands + 1
        before = running.group.cpu_seconds() if running.group is not None else 0.0
        try:
            pipes = self._send(command.message(limits, running.group is not None))
            has_ended = False

            def kill() -> None:
                nonlocal has_ended
                has_ended = _is_readable(running.control)
                if not has_ended:
                    self._kill()

            found = collect_pipes(
                pipes,
                running.control.fileno(),
                stdin,
                wall_seconds=limits.wall_seconds,
                output_bytes=limits.output_bytes,
                kill=kill,
            )
            is_starved = running.group is not None and running.group.was_out_of_memory()
            code, used = (137, 0.0) if is_starved or not has_ended else self._answer()
            if running.group is not None:
                used = running.group.cpu_seconds() - before
        except BaseException:
            self.close()
            raise
        stopped_by = found.stopped_by or ("memory" if is_starved else None)
        if stopped_by is not None:
            self.close()
        return ExecResult(
            exit_code=code,
            stdout=bytes(found.stdout),
            stderr=bytes(found.stderr),
            seconds=time.monotonic() - started,
            cpu_seconds=used,
            stopped_by=stopped_by or ("cpu" if used > limits.cpu_seconds else None),
        )

    def _kill(self) -> None:
        if self._running.group is not None:
            self._running.group.kill()
        kill_group(self._running.process)

    def _send(self, message: bytes) -> Pipes:
        """Hand a request over with the far ends of three pipes; our ends."""
        ends = [os.pipe() for _ in range(3)]
        theirs = [ends[0][0], ends[1][1], ends[2][1]]
        ours = [ends[0][1], ends[1][0], ends[2][0]]
        try:
            control = self._running.control
            control.settimeout(_ANSWER_SECONDS)
            sent = socket.send_fds(control, [message], theirs)
            control.sendall(memoryview(message)[sent:])
        except OSError as error:
            for descriptor in ours:
                os.close(descriptor)
            raise SandboxError(f"the prepared sandbox is gone: {self._complaint()}") from error
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        source, stdout, stderr = ours
        return os.fdopen(source, "wb", 0), os.fdopen(stdout, "rb", 0), os.fdopen(stderr, "rb", 0)

    def _answer(self, timeout_seconds: float = _ANSWER_SECONDS) -> tuple[int, float]:
        """The status and the processor time of a command that has ended."""
        self._running.control.settimeout(timeout_seconds)
        code, used, size = _REPLY.unpack(self._exactly(_REPLY.size))
        if size:
            reason = self._exactly(min(size, 4096)).decode(errors="replace")
            raise SandboxError(f"the command could not be isolated: {reason}")
        return code, used

    def _exactly(self, size: int) -> bytes:
        data = b""
        try:
            while len(data) < size:
                part = self._running.control.recv(size - len(data))
                if not part:
                    raise SandboxError(f"the prepared sandbox died: {self._complaint()}")
                data += part
        except OSError as error:
            raise SandboxError(f"the prepared sandbox is silent: {self._complaint()}") from error
        return data

    def _complaint(self) -> str:
        os.lseek(self._running.errors, 0, os.SEEK_SET)
        return os.read(self._running.errors, 2000).decode(errors="replace")[-500:] or "no reason"


def _started(program: str, group: cgroup.Group | None) -> _Running:
    ours, theirs = socket.socketpair()
    errors = os.memfd_create("m1-zygote")
    try:
        with theirs:
            process = subprocess.Popen(
                [*_arguments(program), *PYTHON, "-c", _ZYGOTE.read_text(), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
                env={},
                preexec_fn=_entry(group),
            )
    except BaseException:
        ours.close()
        os.close(errors)
        if group is not None:
            group.remove()
        raise
    return _Running(process, ours, errors, group, os.getpid())


def _arguments(program: str) -> list[str]:
    arguments = [
        program,
        *("--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--clearenv"),
        *("--hostname", "sandbox", "--uid", "1000", "--gid", "1000", "--cap-drop", "ALL"),
    ]
    for right in _RIGHTS:
        arguments += ["--cap-add", right]
    arguments += [
        *bubblewrap.system_mounts(),
        *("--proc", "/proc", "--dir", "/tmp", "--dir", "/work", "--dir", "/dev/shm"),
    ]
    # Not --dev: for its terminals bubblewrap would end in a namespace that does not own its mounts.
    for name in ("null", "zero", "full", "random", "urandom"):
        arguments += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for name, target in _LINKS.items():
        arguments += ["--symlink", f"/proc/self/fd{target}", f"/dev/{name}"]
    arguments += ["--remount-ro", "/"]
    for name, value in bubblewrap.VARIABLES.items():
        arguments += ["--setenv", name, value]
    return [*arguments, "--"]


def _entry(group: cgroup.Group | None) -> Callable[[], None]:
    """What the child does between fork and exec; the bounds of commands come with each."""
    entrances = tuple(os.fsencode(path) for path in group.entrances) if group is not None else ()
    is_root = os.geteuid() == 0
    files, size = starter.OPEN_FILES, starter.FILE_BYTES

    def enter() -> None:
        cgroup.enter(entrances)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        if is_root:
            bubblewrap.drop_root()

    return enter


def _is_readable(control: socket.socket) -> bool:
    control.setblocking(False)
    try:
        return bool(control.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
