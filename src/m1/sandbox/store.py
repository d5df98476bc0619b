"""What a local sandbox writes: one bounded filesystem for each, and folders put into it.

Root mounts a tmpfs with a bound on bytes and on files. Without root it is a plain folder whose size
is looked at after every command.
"""

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from m1.sandbox import owner
from m1.sandbox.base import MIB, Limits, SandboxError

UNPRIVILEGED_ID = 200_001
"""User and group that root becomes before bubblewrap starts; owns nothing else on the host."""
PREFIX = "m1-sandbox-"
_MS_NOSUID, _MS_NODEV, _MNT_DETACH = 2, 4, 2
_libc = ctypes.CDLL(None, use_errno=True)
_MADE = re.compile(rf"{PREFIX}([0-9]+\.[0-9]+)-\w+")
_EMPTYING_SECONDS = 5.0


class Store:
    """A folder of this machine that one sandbox owns, bounded where root mounts it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{owner.tag()}-"))
        self.folder.chmod(0o755)  # others may pass through; what lies below is closed to them
        self.files = self.folder / "files"
        self.files.mkdir(mode=0o700)
        self._is_mounted = os.geteuid() == 0
        if self._is_mounted:
            self._mount()

    def make(self, name: str, *, mode: int = 0o755) -> Path:
        """A new folder that the sandbox's user owns."""
        path = self.files / name
        path.mkdir(mode=mode, parents=True)
        path.chmod(mode)
        if self._is_mounted:
            os.chown(path, UNPRIVILEGED_ID, UNPRIVILEGED_ID)
        return path

    def copy_in(self, source: Path, target: Path) -> None:
        """Copy a folder's content, sharing blocks where the filesystem can."""
        command = ["cp", "--archive", "--reflink=auto", "--", f"{source}/.", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SandboxError(
                f"{source} cannot be copied into the sandbox: {done.stderr[-300:]}; "
                f"raise limits.scratch_mib ({self.limits.scratch_mib})"
            )

    def adopt(self, folder: Path) -> None:
        """Give everything below to the sandbox's user."""
        if self._is_mounted:
            give_to_sandbox(folder)

    def used_bytes(self) -> int:
        """What the files take."""
        if self._is_mounted:
            state = os.statvfs(self.files)
            return (state.f_blocks - state.f_bfree) * state.f_frsize
        return sum(
            os.lstat(Path(folder, name)).st_blocks * 512
            for folder, _, names in os.walk(self.files)
            for name in names
        )

    def is_over(self) -> bool:
        """Whether more was written than allowed; never so where the kernel enforces it."""
        return not self._is_mounted and self.used_bytes() > self.limits.scratch_mib * MIB

    def remove(self) -> None:
        """Delete it; may be called twice."""
        _remove(self.folder)

    def _mount(self) -> None:
        size = f"size={self.limits.scratch_mib}m,nr_inodes={self.limits.num_files}"
        user = f"mode=700,uid={UNPRIVILEGED_ID},gid={UNPRIVILEGED_ID}"
        flags = _MS_NOSUID | _MS_NODEV
        target, options = os.fsencode(self.files), f"{size},{user}".encode()
        if _libc.mount(b"m1-sandbox", target, b"tmpfs", flags, options):
            number = ctypes.get_errno()
            shutil.rmtree(self.folder)
            raise SandboxError(
                f"a bounded filesystem cannot be mounted for the sandbox: {os.strerror(number)}; "
                "give root CAP_SYS_ADMIN or run as another user"
            )


def give_to_sandbox(folder: Path) -> None:
    """Make the sandbox's user the owner of a folder and all below, links not followed.

    An environment's folder that belongs to that user is shared by all sandboxes as the lower side
    of an overlay; any other is copied into each. Without root nothing is to be done.
    """
    if os.geteuid() == 0:
        subprocess.run(
            ["chown", "-hR", f"{UNPRIVILEGED_ID}:{UNPRIVILEGED_ID}", "--", str(folder)], check=True
        )


def is_shared(folder: Path) -> bool:
    """Whether sandboxes may use the folder in place: their user owns it."""
    user = UNPRIVILEGED_ID if os.geteuid() == 0 else os.geteuid()
    return folder.stat().st_uid == user


def sweep() -> int:
    """Remove stores whose owner died before closing them; how many."""
    removed = 0
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        found = _MADE.fullmatch(path.name)
        if found and not owner.is_alive(found[1]):
            with contextlib.suppress(PermissionError):  # another user's
                _remove(path)
                removed += 1
    return removed


def _remove(folder: Path) -> None:
    """Unmount and delete; a dying process may hold the folder for a moment."""
    deadline = time.monotonic() + _EMPTYING_SECONDS
    files = os.fsencode(folder / "files")
    while os.path.ismount(files) and _libc.umount2(files, _MNT_DETACH):
        if time.monotonic() > deadline:
            raise SandboxError(f"{folder} cannot be unmounted: {os.strerror(ctypes.get_errno())}")
        time.sleep(0.01)
    _open_up(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _open_up(folder: Path) -> None:
    """Without root, folders that the sandbox closed to its own user are opened for deletion."""
    if os.geteuid() == 0:
        return
    for path, folders, _ in os.walk(folder):
        for name in folders:
            if not os.path.islink(os.path.join(path, name)):
                os.chmod(os.path.join(path, name), 0o700)
