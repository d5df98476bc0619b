"""One control group per command: bounds on memory and processes, and a sure way to kill them all.

Version 1 needs root. Version 2 needs a delegated group: M1_CGROUP names it, or root takes the top.
"""

import contextlib
import errno
import itertools
import os
import signal
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

from m1.sandbox import owner
from m1.sandbox.base import MIB, SandboxError

_ROOT = Path("/sys/fs/cgroup")
_PREFIX = "m1-sandbox"
_EMPTYING_SECONDS = 10.0
_numbers = itertools.count()


class Group(Protocol):
    """A control group of either version."""

    @property
    def entrances(self) -> tuple[str, ...]:
        """Files that a process writes "0" into to enter."""

    def bound(self, *, memory_mib: int, num_processes: int) -> None:
        """Set the bounds of a group that has none yet."""

    def kill(self) -> None:
        """Kill every process inside and wait until none is left."""

    def was_out_of_memory(self) -> bool:
        """Whether the kernel killed a process for memory."""

    def cpu_seconds(self) -> float:
        """Processor time of all processes that were ever inside."""

    def remove(self) -> None:
        """Delete the empty group."""


@cache
def version() -> int:
    """1 or 2: what this process may create groups in; 0 for neither."""
    if (_ROOT / "cgroup.controllers").exists():
        return 2 if _can_create(_parent_v2()) else 0
    folders = [_ROOT / name for name in GroupV1.controllers]
    return 1 if all(folder.is_dir() and _can_create(folder) for folder in folders) else 0


def create(*, memory_mib: int | None = None, num_processes: int | None = None) -> Group | None:
    """A new group, with bounds where they are given; None where none can be made."""
    if version() == 0:
        return None
    name = f"{_PREFIX}-{owner.tag()}-{next(_numbers)}"
    try:
        group = GroupV2(name) if version() == 2 else GroupV1(name)
        if memory_mib is not None and num_processes is not None:
            group.bound(memory_mib=memory_mib, num_processes=num_processes)
    except OSError as error:
        raise SandboxError(f"control group {name} cannot be made: {error}") from error
    return group


def enter(entrances: Sequence[bytes]) -> None:
    """Put this process into the group of these entrances."""
    for path in entrances:
        descriptor = os.open(path, os.O_WRONLY)
        os.write(descriptor, b"0")
        os.close(descriptor)


def sweep() -> int:
    """Empty and remove groups whose owner died before closing them; how many."""
    kinds: dict[int, type[GroupV1] | type[GroupV2]] = {1: GroupV1, 2: GroupV2}
    kind = kinds.get(version())
    if kind is None:
        return 0
    removed = 0
    for name in kind.names():
        if not owner.is_alive(name.split("-")[2]):
            group = kind.existing(name)
            with contextlib.suppress(SandboxError, OSError):  # others may be at it
                group.kill()
                group.remove()
                removed += 1
    return removed


class GroupV1:
    """One folder in each of three hierarchies."""

    controllers = ("memory", "pids", "cpuacct")

    def __init__(self, name: str) -> None:
        self._folders = [_ROOT / controller / name for controller in self.controllers]
        for folder in self._folders:
            folder.mkdir()

    def bound(self, *, memory_mib: int, num_processes: int) -> None:
        """memory.limit_in_bytes, with swap too where it is counted, and pids.max."""
        memory, pids, _ = self._folders
        (memory / "memory.limit_in_bytes").write_text(str(memory_mib * MIB))
        with contextlib.suppress(OSError):  # absent without swap accounting
            (memory / "memory.memsw.limit_in_bytes").write_text(str(memory_mib * MIB))
        (pids / "pids.max").write_text(str(num_processes))

    @classmethod
    def existing(cls, name: str) -> "GroupV1":
        """A group that is already there."""
        group = cls.__new__(cls)
        group._folders = [_ROOT / controller / name for controller in cls.controllers]
        return group

    @classmethod
    def names(cls) -> list[str]:
        """All groups of this module, whoever made them."""
        found = {p.name for c in cls.controllers for p in (_ROOT / c).glob(f"{_PREFIX}-*")}
        return sorted(found)

    @property
    def entrances(self) -> tuple[str, ...]:
        """One file a hierarchy."""
        return tuple(str(folder / "cgroup.procs") for folder in self._folders)

    def kill(self) -> None:
        """Kill until none is left: a fork between reading and killing is met in the next round."""
        for _ in _rounds():
            if not any(_kill_listed(folder / "cgroup.procs") for folder in self._folders):
                return
        raise SandboxError(f"processes in {self._folders[1]} survive SIGKILL")

    def was_out_of_memory(self) -> bool:
        """`oom_kill` of memory.oom_control."""
        return _counter(self._folders[0] / "memory.oom_control", "oom_kill") > 0

    def cpu_seconds(self) -> float:
        """cpuacct.usage."""
        return int((self._folders[2] / "cpuacct.usage").read_text()) / 1e9

    def remove(self) -> None:
        """Delete the folders."""
        for folder in self._folders:
            _remove_folder(folder)


class GroupV2:
    """One folder of the unified hierarchy."""

    def __init__(self, name: str) -> None:
        self._folder = _parent_v2() / name
        self._folder.mkdir()

    def bound(self, *, memory_mib: int, num_processes: int) -> None:
        """memory.max, memory.swap.max and pids.max."""
        (self._folder / "memory.max").write_text(str(memory_mib * MIB))
        with contextlib.suppress(OSError):  # absent without swap accounting
            (self._folder / "memory.swap.max").write_text("0")
        (self._folder / "pids.max").write_text(str(num_processes))

    @classmethod
    def existing(cls, name: str) -> "GroupV2":
        """A group that is already there."""
        group = cls.__new__(cls)
        group._folder = _parent_v2() / name
        return group

    @classmethod
    def names(cls) -> list[str]:
        """All groups of this module, whoever made them."""
        return sorted(path.name for path in _parent_v2().glob(f"{_PREFIX}-*"))

    @property
    def entrances(self) -> tuple[str, ...]:
        """The one file."""
        return (str(self._folder / "cgroup.procs"),)

    def kill(self) -> None:
        """cgroup.kill, or one by one before Linux 5.14."""
        killer = self._folder / "cgroup.kill"
        if killer.exists():
            killer.write_text("1")
        for _ in _rounds():
            if not _kill_listed(self._folder / "cgroup.procs"):
                return
        raise SandboxError(f"processes in {self._folder} survive SIGKILL")

    def was_out_of_memory(self) -> bool:
        """`oom_kill` of memory.events."""
        return _counter(self._folder / "memory.events", "oom_kill") > 0

    def cpu_seconds(self) -> float:
        """`usage_usec` of cpu.stat."""
        return _counter(self._folder / "cpu.stat", "usage_usec") / 1e6

    def remove(self) -> None:
        """Delete the folder."""
        _remove_folder(self._folder)


def _parent_v2() -> Path:
    return Path(os.environ.get("M1_CGROUP", str(_ROOT)))


def _can_create(folder: Path) -> bool:
    probe = folder / f"m1-probe-{os.getpid()}"
    try:
        probe.mkdir()
        is_bounded = folder.parent == _ROOT or (probe / "memory.max").exists()
        probe.rmdir()
    except OSError:
        return False
    return is_bounded


def _rounds() -> Iterator[None]:
    deadline = time.monotonic() + _EMPTYING_SECONDS
    pause = 0.0005
    while time.monotonic() < deadline:
        yield
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def _kill_listed(path: Path) -> bool:
    """Kill what the file lists; whether it listed anything."""
    try:
        pids = path.read_text().split()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):  # removed, before or after it was opened
            return False
        raise
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    return bool(pids)


def _counter(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _remove_folder(folder: Path) -> None:
    for _ in _rounds():  # a killed process leaves its group a moment after it is gone
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            continue
    raise SandboxError(f"control group {folder} cannot be removed")
