"""Workers of a pool: `m1 serve` processes started here, or servers that run elsewhere."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

from m1.inference.client import EngineUnavailableError, HttpEngine

Connect = Callable[[str, str | None], HttpEngine]
"""(url, bearer token) -> an engine."""
TOKEN_VARIABLE = "M1_SERVE_TOKEN"
_START_SECONDS = 300.0
_POLL_SECONDS = 0.1


class GivenServer:
    """A server that runs already; M1_SERVE_TOKEN is its bearer token."""

    def __init__(self, url: str, *, engine: Connect) -> None:
        self.name, self._engine = url, engine

    def connect(self) -> HttpEngine:
        """See `m1.rollout.workers.Worker`."""
        token = os.environ.get(TOKEN_VARIABLE) or None
        _require_health(self.name)
        return self._engine(self.name, token)

    def close(self) -> None:
        """Nothing: it belongs to others."""


class ServedProcess:
    """An `m1 serve` on this machine, which ends with this process, even by SIGKILL."""

    def __init__(
        self,
        source: Path,
        options: Sequence[str],
        *,
        name: str,
        log: Path,
        environment: Mapping[str, str],
        engine: Connect,
    ) -> None:
        """Describe the process; `connect` starts it.

        Args:
            source: What to serve.
            options: Further arguments of `m1 serve`.
            name: For messages.
            log: Where its words go.
            environment: Beside this process's.
            engine: Makes the client.
        """
        self.name, self._source, self._options = name, source, options
        self._log, self._environment, self._engine = log, environment, engine
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._process.pid if self._process else None

    def connect(self) -> HttpEngine:
        """See `m1.rollout.workers.Worker`; a process that was there before is ended."""
        self._end()
        if self._is_closed:
            raise EngineUnavailableError(f"{self.name} was closed")
        port, token = _free_port(), secrets.token_hex(16)
        command = [sys.executable, "-c", "from m1.cli import main; main()", "serve"]
        command += [str(self._source), "--port", str(port), *self._options]
        environment = {
            **{k: v for k, v in os.environ.items() if k not in _OF_RANKS},
            "M1_LAUNCHER_PID": str(os.getpid()),
            TOKEN_VARIABLE: token,
            **self._environment,
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                _require_health(url)
            except EngineUnavailableError:
                time.sleep(_POLL_SECONDS)
            else:
                return self._engine(url, token)
        status = self._process.poll()
        self._end()
        how = "did not come up" if status is None else f"ended with status {status}"
        raise EngineUnavailableError(f"{self.name} {how}; its words are in {self._log}")

    def close(self) -> None:
        """End the process."""
        self._is_closed = True
        self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""A worker started by a rank is none itself."""


def _require_health(url: str) -> None:
    try:
        response = httpx.get(f"{url}/health", timeout=5)
    except httpx.HTTPError as error:
        raise EngineUnavailableError(f"{url} does not answer ({error})") from error
    if not response.is_success:
        raise EngineUnavailableError(f"{url} answers {response.status_code} at /health")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
