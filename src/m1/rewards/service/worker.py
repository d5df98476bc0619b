"""The life of one worker process: a job in, a verdict out, until the service hangs up."""

import contextlib
import ctypes
import os
import resource
import signal
import socket
from pathlib import Path
from typing import Any

from m1.rewards.registry import load, spec_of
from m1.rewards.service import wire
from m1.sandbox.base import SandboxError
from m1.types import Task

_MIB = 1 << 20
_PR_SET_PDEATHSIG = 1


def work(connection: socket.socket) -> None:
    """Serve jobs one after the other; every answer follows `started`, from which time counts."""
    _bind_to_parent()
    with contextlib.suppress(wire.PeerGone):
        while True:
            job = wire.receive(connection)
            task = Task(**job["task"])
            memory = spec_of(task.verifier).memory_mib
            try:
                verify = load(task.verifier)
            except Exception as error:  # a missing library is named, whatever it raises
                wire.send(connection, {"error": f"cannot load {task.verifier}: {_named(error)}"})
                continue
            wire.send(connection, {"started": True})
            wire.send(connection, _judged(verify, task, job["completion"], memory))


def _judged(verify: Any, task: Task, completion: str, memory_mib: int | None) -> dict[str, Any]:
    with _bounded_memory(memory_mib):
        try:
            verdict = verify(task, completion)
        except MemoryError:
            return {"exhausted": "memory"}
        except RecursionError:
            return {"exhausted": "recursion"}
        except Exception as error:  # verifiers raise what they like; it is reported, not hidden
            is_ours = isinstance(error, SandboxError | OSError)
            return {"error": _named(error), "is_retried": is_ours}
    return {"accuracy": verdict.accuracy, "reason": verdict.reason, "parts": verdict.parts}


@contextlib.contextmanager
def _bounded_memory(memory_mib: int | None) -> Any:
    """Bound the address space to what is in use now and `memory_mib`."""
    if memory_mib is None:
        yield
        return
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + memory_mib * _MIB, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _bind_to_parent() -> None:
    """Own process group, so that all of it can be killed; dead when the parent dies."""
    os.setsid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the service decides, not the terminal
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]
