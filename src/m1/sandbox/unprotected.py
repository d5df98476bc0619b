"""A plain subprocess behind the sandbox's interface, for programs that are trusted."""

import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from m1.sandbox.base import MIB, ClosedAtExit, ExecResult, Limits
from m1.sandbox.process import collect, kill_group


class UnprotectedProcess(ClosedAtExit):
    """Runs commands of the user's own in a temporary folder, with rlimits and nothing else.

    Paths below /work in a command mean the folder, which a real sandbox mounts there.
    """

    def __init__(self, *, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._folder = Path(tempfile.mkdtemp(prefix="m1-trusted-"))

    def write_file(self, name: str, data: bytes, *, is_executable: bool = False) -> None:
        """Create or replace a file in the folder."""
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
        """Run a command with this process's rights."""
        bounds = limits or self._limits
        cpu = max(1, int(-(-bounds.cpu_seconds // 1)))
        memory = bounds.memory_mib * MIB

        def enter() -> None:
            resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

        started = time.monotonic()
        before = os.times()
        process = subprocess.Popen(
            [part.replace("/work/", f"{self._folder}/") for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self._folder,
            start_new_session=True,
            env={"PATH": "/usr/bin:/bin", **(environment or {})},
            preexec_fn=enter,
        )
        found = collect(
            process,
            stdin,
            wall_seconds=bounds.wall_seconds,
            output_bytes=bounds.output_bytes,
            kill=lambda: kill_group(process),
        )
        after = os.times()
        used = after.children_user + after.children_system
        used -= before.children_user + before.children_system
        code = process.returncode
        return ExecResult(
            exit_code=code if code >= 0 else 128 - code,
            stdout=bytes(found.stdout),
            stderr=bytes(found.stderr),
            seconds=time.monotonic() - started,
            cpu_seconds=used,
            stopped_by=found.stopped_by or ("cpu" if used > bounds.cpu_seconds else None),
        )

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)
