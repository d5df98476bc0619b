"""A process that has the verifiers imported and forks workers off itself in milliseconds.

Started as `python -m m1.rewards.service.nursery FD`. It holds no job and no answer. It alone waits
for its children, so a worker's id cannot name another process while the service still uses it.
"""

import gc
import os
import signal
import socket
import sys

from m1.rewards.registry import load
from m1.rewards.service import wire
from m1.rewards.service.worker import work


def main(descriptor: int) -> None:
    """Serve `preload`, `spawn` and `reap` until the service hangs up, then kill all workers."""
    control = socket.socket(fileno=descriptor)
    children: set[int] = set()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while True:
            request = wire.receive(control)
            if "preload" in request:
                wire.send(control, {"failure": _preload(request["preload"])})
            elif "spawn" in request:
                _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
                children.add(pid := _spawn(descriptors[0], control))
                wire.send(control, {"pid": pid})
            else:
                status = _reap(request["reap"])
                children.discard(request["reap"])
                wire.send(control, {"status": status})
    except wire.PeerGone:
        for pid in children:
            _reap(pid)


def _preload(kind: str) -> str | None:
    try:
        load(kind)
    except Exception as error:  # workers will name it with the job; the nursery must live
        return f"{type(error).__name__}: {error}"
    gc.freeze()  # the collector then leaves shared pages unwritten in every fork
    return None


def _spawn(descriptor: int, control: socket.socket) -> int:
    pid = os.fork()
    if pid:
        os.close(descriptor)
        return pid
    status = 1
    try:
        control.close()
        work(socket.socket(fileno=descriptor))
        status = 0
    finally:
        os._exit(status)


def _reap(pid: int) -> int:
    """Kill a worker and all that is left of its group; its exit status, negative for a signal."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        _kill_alone(pid)  # not yet in its own group
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _kill_alone(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    main(int(sys.argv[1]))
