"""What every sandbox offers, whatever stands behind it."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

MIB = 1 << 20
WORK = "/work"
"""Folder that commands start in, and that relative paths of files belong to."""

OutputSink = Callable[[str, bytes], None]
"""Called with `stdout` or `stderr` and the bytes that just came."""

_SIGKILLED, _SIGXCPU = 128 + 9, 128 + 24
_TICKS = 0.9
_ESCAPES = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # operating system command: title, clipboard, links
    r"|\x1b[PX^_].*?(?:\x1b\\|$)"  # device control and other strings
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # control sequence: cursor, colour, reports
    r"|\x1b[ -/]*[0-~]?",
    re.DOTALL,
)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class SandboxError(Exception):
    """The sandbox itself failed; says nothing about the program that was to run."""


class SandboxGone(SandboxError):
    """The sandbox ended under us: its pod was deleted, its lease ran out, its machine is lost."""


@dataclass(frozen=True)
class Limits:
    """What one `exec` may use; a cluster fixes memory, processes and scratch when it opens."""

    cpu_seconds: float = 10.0
    """Processor time of all its processes; the kernel enforces whole seconds, rounded up."""
    wall_seconds: float = 20.0
    """Time until everything is killed."""
    memory_mib: int = 512
    """All processes together, tmpfs included; each process alone where there is no cgroup."""
    num_processes: int = 64
    """Processes and threads at once."""
    output_bytes: int = 8 * MIB
    """Standard output; a program that writes more is killed. Standard error keeps 64 KiB."""
    scratch_mib: int = 64
    """All that can be written, over the sandbox's whole life; fixed when it opens."""
    num_files: int = 65_536
    """Files and folders that can be made; fixed when it opens."""


@dataclass(frozen=True)
class ExecResult:
    """How one command ended."""

    exit_code: int
    """As a shell would say it: 128 + signal for a killed program."""
    stdout: bytes
    stderr: bytes
    seconds: float
    """Wall time, the sandbox's own start included."""
    cpu_seconds: float
    """Processor time of all processes that were waited for, or of the cgroup where there is one."""
    stopped_by: str | None = None
    """`wall`, `cpu`, `memory`, `output` or `disk`: the limit that ended it; None when it ended
    itself."""


def met_cpu_limit(limits: Limits, cpu_seconds: float, exit_code: int) -> bool:
    """Whether processor time ended a command: the kernel's count may differ by a few ticks."""
    was_killed = exit_code in (_SIGKILLED, _SIGXCPU)
    return cpu_seconds > limits.cpu_seconds or (
        was_killed and cpu_seconds > _TICKS * max(1.0, limits.cpu_seconds)
    )


@dataclass(frozen=True)
class Environment:
    """What a sandbox begins with. Nothing done inside changes it."""

    image: str = ""
    """Root filesystem: a folder for the local backend, an OCI reference in a cluster. Without one
    this machine's /usr, read-only, or the cluster's default image."""
    layers: Mapping[str, Path] = field(default_factory=dict)
    """Absolute path inside -> folder here. Writable inside: by overlay or copy locally, uploaded
    in a cluster (where the path must lie below /work or /tmp)."""
    read_only: Mapping[str, Path] = field(default_factory=dict)
    """The same, but not to be written inside: an interpreter, a runner of tests. Local only."""


class ClosedAtExit:
    """`with` for what has a `close`, which ends it whatever happened inside."""

    def __enter__(self) -> Self:
        """The thing itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Remove everything; may be called twice."""
        raise NotImplementedError


class SealedSandbox(Protocol):
    """A place to run programs on files of /work, which is read-only inside.

    Nothing survives from one `exec` to the next but these files.
    """

    def write_file(self, name: str, data: bytes, *, is_executable: bool = False) -> None:
        """Create or replace `/work/name`."""

    def exec(
        self,
        command: Sequence[str],
        *,
        stdin: bytes = b"",
        limits: Limits | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> ExecResult:
        """Run a command to its end or to a limit; every process it started is dead afterwards.

        Raises:
            SandboxError: The sandbox could not start, or could not be emptied.
        """

    def close(self) -> None:
        """Remove everything; may be called twice."""

    def __enter__(self) -> Self:
        """The sandbox itself."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""


class Sandbox(Protocol):
    """A machine of its own for one episode: files that a command writes stay until `close`.

    Processes do not stay: when `exec` returns, all that the command started is dead. Not for two
    threads at once.
    """

    @property
    def name(self) -> str:
        """Unique among all sandboxes of the backend; what garbage collection and logs say."""

    def exec(
        self,
        command: Sequence[str],
        *,
        stdin: bytes = b"",
        limits: Limits | None = None,
        environment: Mapping[str, str] | None = None,
        folder: str = WORK,
        on_output: OutputSink | None = None,
    ) -> ExecResult:
        """Run a command to its end or to a limit; every process it started is dead afterwards.

        Args:
            command: Program and arguments; no shell reads them.
            stdin: All of its standard input.
            limits: In place of those given when it was opened.
            environment: Variables beside PATH, HOME and LANG; nothing else is seen.
            folder: Absolute path to start in.
            on_output: Sees output while it comes, within `output_bytes`.

        Raises:
            SandboxError: The sandbox could not start the command, or could not be emptied.
            SandboxGone: It does not exist any more.
        """

    def write_file(self, path: str, data: bytes, *, is_executable: bool = False) -> None:
        """Create or replace a file, and folders on the way; relative paths lie in /work.

        Links inside are followed inside: they cannot lead out.

        Raises:
            SandboxError: The path is a folder, or cannot be written.
        """

    def read_file(self, path: str, *, max_bytes: int = 8 * MIB) -> bytes:
        """What a file holds.

        Raises:
            SandboxError: It does not exist, is no plain file, or is larger.
        """

    def write_folder(self, path: str, source: Path) -> None:
        """Copy a folder of this machine to `path`, with modes and links, over what is there."""

    def renew(self, seconds: float) -> None:
        """Promise to be alive for so long from now; then a cluster ends the sandbox by itself."""

    def fork(self) -> Self:
        """Another sandbox that begins with all this one's files; later changes are apart."""

    def close(self) -> None:
        """Remove everything; may be called twice."""

    def __enter__(self) -> Self:
        """The sandbox itself."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""


class Backend(Protocol):
    """Opens sandboxes of one kind; threads may share it."""

    @property
    def name(self) -> str:
        """`bubblewrap`, `kubernetes` or `agent-sandbox`."""

    def open(
        self, environment: Environment | None = None, *, limits: Limits | None = None
    ) -> Sandbox:
        """A fresh sandbox.

        Args:
            environment: What it begins with.
            limits: Defaults of every `exec`; scratch and files for its whole life.

        Raises:
            SandboxError: It cannot be opened, or not as strictly as asked.
        """

    def collect_garbage(self) -> int:
        """Remove what sandboxes of dead or late owners left; how many were removed."""


def printable(data: bytes) -> str:
    """Output of an untrusted program as text that is safe to show on a terminal.

    Escape sequences, control characters other than newline and tab, and marks that reverse the
    direction of text are gone; bytes that are no UTF-8 become U+FFFD.
    """
    return _CONTROLS.sub("", _ESCAPES.sub("", data.decode(errors="replace")))
