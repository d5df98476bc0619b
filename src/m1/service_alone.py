"""Start a service after ending what an earlier start of it left behind.

    python -m m1.service_alone NAME COMMAND...

A server that dies by SIGKILL may leave children that hold its port, and so may a supervisor its
servers; the next one could not listen, while the old child would still answer. All of them are
known by NAME in their environment.
"""

import contextlib
import os
import sys
from collections.abc import Sequence

import psutil

_MARK = "M1_SERVICE"
_KILL_SECONDS = 10.0


def main(name: str, command: Sequence[str]) -> None:
    """Become `command`, the only process of its name."""
    here = {process.pid for process in (psutil.Process(), *psutil.Process().parents())}
    left = [p for p in psutil.process_iter() if p.pid not in here and _is_marked(p, name)]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=_KILL_SECONDS)
    os.environ[_MARK] = name
    os.execvp(command[0], list(command))


def _is_marked(process: psutil.Process, name: str) -> bool:
    try:
        return bool(process.environ().get(_MARK) == name)
    except psutil.Error:  # gone, or another user's
        return False


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
