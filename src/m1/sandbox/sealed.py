"""Programs of strangers on files that they cannot change, each run from nothing.

Inside: /usr and the dynamic linker's cache read-only, /work read-only, a small /tmp.
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from m1.sandbox import bubblewrap, owner
from m1.sandbox.base import MIB, WORK, ClosedAtExit, ExecResult, Limits, SandboxError
from m1.sandbox.store import PREFIX


class SealedBubblewrap(ClosedAtExit):
    """A folder of files and a way to run commands on them; see `base.SealedSandbox`."""

    def __init__(self, *, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{owner.tag()}-"))
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
        """Run a command; see `SealedSandbox.exec`."""
        if self._is_closed:
            raise SandboxError("the sandbox is closed")
        limits = limits or self._limits
        mounts = [
            *bubblewrap.system_mounts(),
            *bubblewrap.DEVICES,
            *("--size", str(limits.scratch_mib * MIB), "--tmpfs", "/tmp"),
            *("--ro-bind", str(self._folder), WORK),
            *("--remount-ro", "/"),
        ]
        return bubblewrap.launch(
            mounts, command, limits=limits, stdin=stdin, environment=environment
        )

    def close(self) -> None:
        """Remove the folder."""
        self._is_closed = True
        shutil.rmtree(self._folder, ignore_errors=True)
