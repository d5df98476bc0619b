"""Names that say which process made a thing, so that what a dead one left can be removed."""

import os
from functools import cache
from pathlib import Path


def tag() -> str:
    """This process: its id and, as ids come again, its start in clock ticks since boot."""
    return _tag(os.getpid())


def is_alive(owner: str) -> bool:
    """Whether the process of a tag still runs; a bare process id is understood too."""
    pid, _, started = owner.partition(".")
    if not pid.isdigit():
        return True  # not ours to judge
    found = _started(int(pid))
    return found is not None and (not started or started == found)


@cache
def _tag(pid: int) -> str:
    return f"{pid}.{_started(pid)}"


def _started(pid: int) -> str | None:
    """Field 22 of /proc/pid/stat; fields are counted after the name, which may hold anything."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
