"""What every sandbox offers, whatever stands behind it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

MIB = 1 << 20


class SandboxError(Exception):
    """The sandbox itself failed; says nothing about the program that was to run."""


@dataclass(frozen=True)
class Limits:
    """What one `exec` may use."""

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
    """Size of /tmp, the only place that can be written."""


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
    """`wall`, `cpu`, `memory` or `output`: the limit that ended it; None when it ended itself."""


class Sandbox(Protocol):
    """A place to run commands in; files given to it lie in /work, read-only inside.

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
