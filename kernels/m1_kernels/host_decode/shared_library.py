"""`decode.c` and `sample.c` as a library, compiled once for this processor, where anything can.

It is compiled rather than shipped, because its speed comes from the processor's own instructions,
and by a plain C compiler in two seconds, because nothing that a step saves would pay for more.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

_FOLDER = Path(__file__).parent
_SOURCES = (_FOLDER / "decode.c", _FOLDER / "sample.c")
_HEADER = _FOLDER / "lanes.h"
_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_TARGETS = (("-march=native",), ("-mcpu=native",), ())
_PATIENCE_SECONDS = 120


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library; None, and a line in the log, where no compiler makes it."""
    command = _compiler()
    if command is None:
        logging.getLogger(__name__).info("no C compiler: decoding on this CPU runs in PyTorch")
        return None
    try:
        found = ctypes.CDLL(str(_compiled(command)))
    except (OSError, subprocess.SubprocessError) as error:
        logging.getLogger(__name__).warning(
            "decoding on this CPU runs in PyTorch, because %s could not make the library (%s)",
            shlex.join(command), getattr(error, "stderr", None) or error,
        )  # fmt: skip
        return None
    found.m1_decode_scratch.restype = ctypes.c_int64
    found.m1_decode.restype = found.m1_sample.restype = None
    return found


def _compiler() -> list[str] | None:
    given = shlex.split(os.environ.get("CC", ""))
    names = [given] if given else [["cc"], ["gcc"], ["clang"]]
    return next((name for name in names if shutil.which(name[0])), None)


def _compiled(command: list[str]) -> Path:
    folder = _folder()
    target = folder / f"decode-{_identity(command)}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / target.name
        for number, processor in enumerate(_TARGETS):
            is_last = number == len(_TARGETS) - 1
            full = [*command, *_FLAGS, *processor, "-o", str(made), *map(str, _SOURCES), "-lm"]
            done = subprocess.run(
                full, capture_output=True, check=is_last, timeout=_PATIENCE_SECONDS
            )
            if done.returncode == 0:
                break
        made.replace(target)
    return target


def _folder() -> Path:
    """The user's cache; where that cannot be written, a folder for this process alone."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "m1"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="m1-"))


def _identity(command: list[str]) -> str:
    """Digest of the source, the compiler and the processor it is compiled for."""
    version = subprocess.run(
        [*command, "--version"], capture_output=True, check=True, timeout=_PATIENCE_SECONDS
    )
    digest = hashlib.sha256()
    for part in (
        *(path.read_bytes() for path in (*_SOURCES, _HEADER)),
        version.stdout,
        repr((_FLAGS, _TARGETS)).encode(),
        _processor().encode(),
    ):
        digest.update(part + b"\0")
    return digest.hexdigest()[:16]


def _processor() -> str:
    """Homes are shared by machines that do not know each other's instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
