"""Layers where the sandbox's user can get at them.

Run by root, sandboxes open their layers as a user who owns nothing else, and who may not pass
through a closed folder such as /root. Layers below one are copied once, to where all may pass.
"""

import hashlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

from m1.sandbox.store import give_to_sandbox
from m1.types import M1Error

_SHARED = Path("/var/cache/m1/layers")


def reachable(folder: Path, *, key: str) -> Path:
    """The layer itself, or a copy of it outside closed folders.

    Args:
        folder: A layer, which never changes once it has its name.
        key: Tells its content; layers of the same key are the same.

    Raises:
        M1Error: The place for copies is not root's own.
    """
    if os.geteuid() != 0 or _all_may_pass(folder):
        return folder
    _SHARED.mkdir(parents=True, exist_ok=True, mode=0o755)
    for place in (_SHARED, _SHARED.parent):
        state = place.lstat()
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != 0 or state.st_mode & 0o022:
            raise M1Error(
                f"{place} can be written by others than root, so layers are not copied there; "
                f"mend its owner and mode, or build below a folder that all may pass, not {folder}"
            )
    mark = folder / "m1-site.json"  # what pip chose on its day
    content = mark.read_bytes() if mark.is_file() else b""
    name = hashlib.sha256(key.encode() + b"\0" + content).hexdigest()[:24]
    target = _SHARED / name
    if not target.is_dir():
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=_SHARED))
        try:
            shutil.copytree(folder, made / "layer", symlinks=True)
            give_to_sandbox(made / "layer")
            os.rename(made / "layer", target)
        except OSError:
            if not target.is_dir():  # another process was first otherwise
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return target


def _all_may_pass(folder: Path) -> bool:
    return all(parent.stat().st_mode & stat.S_IXOTH for parent in folder.resolve().parents)
