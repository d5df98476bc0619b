"""The service's side of the nursery: workers started, asked and put down."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from m1.rewards.service import wire

_ANSWER_SECONDS = 120.0
"""The nursery imports libraries while others wait."""

_BUSY_SHARE = 0.5
"""A worker that was ready to run for less of its time than this was not kept busy by the answer."""
_LEAST_SHARE = 0.1
"""A worker that ran for less of its time than this was kept from it by busy neighbours."""


class NurseryLost(Exception):
    """The nursery died; the next worker starts a new one."""


@dataclass
class Worker:
    """A live worker and the socket to it."""

    pid: int
    connection: socket.socket
    nursery: "Nursery"

    def cpu_seconds(self) -> float:
        """Processor time used so far; 0 when it is gone."""
        try:
            times = psutil.Process(self.pid).cpu_times()
        except psutil.Error:
            return 0.0
        return float(times.user + times.system)

    def waited_seconds(self) -> float:
        """Time its threads were ready to run while others had the processors; 0 where unknown."""
        waited = 0
        for path in Path(f"/proc/{self.pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError, IndexError):
                waited += int(path.read_text().split()[1])
        return waited / 1e9

    def close(self) -> int | None:
        """Kill it with its group; its exit status, None when its nursery is gone too."""
        self.connection.close()
        try:
            return self.nursery.reap(self.pid)
        except NurseryLost:
            return None


class Clock:
    """What a worker did with its time: ran, was ready to but had no processor, or was idle."""

    def __init__(self, worker: Worker, timeout: float) -> None:
        self._worker, self._timeout = worker, timeout
        self._cpu, self._waited = worker.cpu_seconds(), worker.waited_seconds()

    def failure(self) -> str | None:
        """Why a verdict is late by our fault; None when the answer is to blame.

        A verdict's time is wall time, also on busy cores: a worker that was ready to run all along
        is as busy as one that ran, as long as it ran enough to have answered anything reasonable.
        """
        used = self._worker.cpu_seconds() - self._cpu
        ready = used + self._worker.waited_seconds() - self._waited
        if ready < _BUSY_SHARE * self._timeout:
            return "worker_stalled"
        return "worker_starved" if used < _LEAST_SHARE * self._timeout else None


class Nursery:
    """A running nursery process; methods may be called from several threads."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "m1.rewards.service.nursery", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,
            )
        self._control = ours
        self._lock = threading.Lock()
        self.is_lost = False

    def preload(self, kind: str) -> str | None:
        """Import a verifier's module; why that failed, or None."""
        failure: str | None = self._ask({"preload": kind})["failure"]
        return failure

    def spawn(self) -> Worker:
        """Fork a worker."""
        ours, theirs = socket.socketpair()
        with theirs:
            pid = self._ask({"spawn": True}, theirs.fileno())["pid"]
        return Worker(pid, ours, self)

    def reap(self, pid: int) -> int:
        """Kill a worker's process group and wait for it."""
        status: int = self._ask({"reap": pid})["status"]
        return status

    def close(self) -> None:
        """Let it kill its workers and end."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, request: dict[str, Any], descriptor: int | None = None) -> dict[str, Any]:
        with self._lock:
            if self.is_lost:
                raise NurseryLost("the nursery is gone")
            try:
                wire.send(self._control, request)
                if descriptor is not None:
                    socket.send_fds(self._control, [b"f"], [descriptor])
                return wire.receive(self._control, _ANSWER_SECONDS)
            except (wire.PeerGone, wire.TimedOut, OSError) as error:
                self.is_lost = True
                self._process.kill()  # its workers die with it
                self._process.wait()
                raise NurseryLost(f"the nursery is gone ({type(error).__name__})") from error


def _environment() -> dict[str, str]:
    """One thread for each library: workers are many, and threads do not survive a fork."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    paths = os.pathsep.join(path for path in sys.path if path)
    return {**os.environ, **dict.fromkeys(names, "1"), "PYTHONPATH": paths}
