"""A sandbox whose commands start in a few milliseconds: namespaces and interpreter wait for them.

A box is bubblewrap around `m1.sandbox.zygote`, which forks one child for each command. Bubblewrap
keeps the host away from all of them, as in `SealedBubblewrap`. Commands are kept from each other
by what each child gets of its own: process ids, mounts (/work, /tmp, /dev/shm, /proc), IPC, and a
seccomp filter; the network, empty, and the control group belong to the box, in which one command
runs at a time and whose processes are all dead before the next. A command that had to be stopped
takes its box along.
"""

import contextlib
import threading
from collections.abc import Mapping, Sequence
from functools import cache

from m1.sandbox import bubblewrap
from m1.sandbox.base import ClosedAtExit, ExecResult, Limits, SandboxError
from m1.sandbox.box import PYTHON, Box, Command

_COMMANDS_PER_BOX = 500
"""Then addresses and hash seeds are drawn anew."""
_BOXES_PER_THREAD = 3
_own = threading.local()


class PreparedSandbox(ClosedAtExit):
    """See `m1.sandbox.base.SealedSandbox`; boxes are kept by thread and outlive it, files do not.

    Args:
        limits: Defaults of every `exec`.
        purpose: Sandboxes of different purposes never share a box.
    """

    def __init__(self, *, limits: Limits | None = None, purpose: str = "") -> None:
        self._limits, self._purpose = limits or Limits(), purpose
        self._files: dict[str, tuple[bytes, int]] | None = {}

    def write_file(self, name: str, data: bytes, *, is_executable: bool = False) -> None:
        """Create or replace `/work/name`; `name` has no folders."""
        if "/" in name or name in ("", ".", ".."):
            raise ValueError(f"file name {name!r} must be one plain name")
        self._open_files()[name] = (data, 0o755 if is_executable else 0o644)

    def exec(
        self,
        command: Sequence[str],
        *,
        stdin: bytes = b"",
        limits: Limits | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> ExecResult:
        """Run a command; see `SealedSandbox.exec`."""
        files, limits = self._open_files(), limits or self._limits
        variables = {**bubblewrap.VARIABLES, "PWD": "/work", **(environment or {})}
        box = _box(self._purpose, limits)
        return box.run(Command(tuple(command), files, variables), stdin, limits)

    def close(self) -> None:
        """Forget the files."""
        self._files = None

    def _open_files(self) -> dict[str, tuple[bytes, int]]:
        if self._files is None:
            raise SandboxError("the sandbox is closed")
        return self._files


def close_boxes() -> None:
    """Put down the boxes of this thread."""
    for box in getattr(_own, "boxes", {}).values():
        box.close()
    _own.boxes = {}


@cache
def failure() -> str | None:
    """Why no box can be prepared here, although bubblewrap may work; None when one can."""
    if bubblewrap.failure() is not None:
        return bubblewrap.failure()
    command = Command((*PYTHON, "/work/p.py"), {"p.py": (b"print(6 * 7)", 0o644)}, {})
    try:
        with contextlib.closing(Box(memory_mib=256, num_processes=8)) as box:
            result = box.run(command, b"", Limits())
    except (SandboxError, OSError) as error:
        return str(error)
    return None if result.stdout == b"42\n" else f"the first program ends with {result.exit_code}"


def _box(purpose: str, limits: Limits) -> Box:
    """This thread's box of such bounds."""
    boxes: dict[tuple[str, int, int], Box] = _own.__dict__.setdefault("boxes", {})
    key = (purpose, limits.memory_mib, limits.num_processes)
    box = boxes.pop(key, None)
    if box is not None and (not box.is_open or box.num_commands >= _COMMANDS_PER_BOX):
        box.close()
        box = None
    if box is None:
        while len(boxes) >= _BOXES_PER_THREAD:
            boxes.pop(next(iter(boxes))).close()
        box = Box(memory_mib=limits.memory_mib, num_processes=limits.num_processes)
    boxes[key] = box  # the last in the order of use
    return box
