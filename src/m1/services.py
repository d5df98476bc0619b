"""Real services on one machine: an S3 server, MLflow, the inference server, under a supervisor.

`m1 up` writes a folder `<root>/services` and starts supervisord on it:

    services.json      addresses and ports, kept from one start to the next
    secrets/           keys of the S3 server, made at random, readable by this user only
    supervisord.conf   programs/*.conf   logs/   s3/   mlflow.db

supervisord (PyPI `supervisor`) starts programs again when they die. `Services.environment` is what
a process needs to use them; keys go by file name, never by value.
"""

import contextlib
import hashlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m1.service_files import (
    ACCESS_KEY,
    SECRET_KEY,
    claim_ports,
    write_configuration,
    write_mlflow,
    write_program,
    write_s3,
    write_secret,
)
from m1.types import M1Error

BUCKET = "m1-store"
START_SECONDS = 180.0
_STOP_SECONDS = 60.0


@dataclass(frozen=True)
class ServiceState:
    """What `m1 status` says of one program."""

    name: str
    state: str
    """supervisord's word: RUNNING, STARTING, BACKOFF, FATAL, EXITED, STOPPED."""
    address: str = ""
    is_answering: bool | None = None
    """None for what has no address."""
    detail: str = ""


class Services:
    """The services below a run root."""

    def __init__(self, root: Path) -> None:
        self.folder = root.absolute() / "services"

    @property
    def ports(self) -> dict[str, int]:
        """Ports by name; M1Error when the services were never started."""
        try:
            found: dict[str, int] = json.loads((self.folder / "services.json").read_text())
        except FileNotFoundError:
            raise M1Error(
                f"there are no services below {self.folder.parent}; start them with "
                f"`m1 up --root {self.folder.parent}`"
            ) from None
        return found

    @property
    def s3_endpoint(self) -> str:
        """Address of the S3 server."""
        return f"http://127.0.0.1:{self.ports['s3']}"

    @property
    def mlflow_uri(self) -> str:
        """Address of the MLflow server."""
        return f"http://127.0.0.1:{self.ports['mlflow']}"

    def environment(self) -> dict[str, str]:
        """Variables for a process that uses the services."""
        kept = self.folder / "secrets"
        return {
            "S3_ENDPOINT": self.s3_endpoint,
            "AWS_ACCESS_KEY_ID_FILE": str(kept / ACCESS_KEY),
            "AWS_SECRET_ACCESS_KEY_FILE": str(kept / SECRET_KEY),
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
        }

    def up(self, *, model: str | None = None) -> list[ServiceState]:
        """Start what does not run, and wait until all of it answers.

        Args:
            model: Folder that the inference server is to serve; absent: none is started.

        Raises:
            M1Error: A program is not installed, or does not start; its log is named.
        """
        for module, package in (("supervisor", "supervisor"), ("mlflow", "mlflow")):
            _require(module, package)
        self._prepare(model)
        if not self._is_running():
            command = [sys.executable, "-m", "supervisor.supervisord"]
            subprocess.run([*command, "-c", str(self._configuration)], check=True)
        with self._supervisor() as server:
            _apply(server, only=None)
        self._wait_until_answering()
        self._make_bucket()
        return self.status()

    def down(self) -> bool:
        """Stop everything; what was stored stays. Whether anything ran."""
        import psutil

        if not self._is_running():
            return False
        with self._supervisor() as server:
            pid = server.supervisor.getPID()
            server.supervisor.shutdown()
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(timeout=_STOP_SECONDS)
        return True

    def status(self) -> list[ServiceState]:
        """State of every program; empty when the supervisor does not run."""
        if not (self.folder / "services.json").exists() or not self._is_running():
            return []
        with self._supervisor() as server:
            found = server.supervisor.getAllProcessInfo()
        return [
            ServiceState(
                name=program["name"],
                state=program["statename"],
                address=self._address(program["name"]),
                is_answering=self._is_answering(program["name"]),
                detail=program["description"] or program["spawnerr"],
            )
            for program in sorted(found, key=lambda program: program["name"])
        ]

    def start_program(self, name: str, command: Sequence[str]) -> Path:
        """Run a command under the supervisor, such as a training run.

        It is started again when it dies by a signal or crashes, not when it ends with status 0 or 1
        (1: a mistake that the user can mend).

        Returns:
            Its log.
        """
        write_program(
            self.folder,
            name,
            command,
            environment=dict(self.environment()),
            directory=Path.cwd(),
            extra={"exitcodes": "0,1", "autorestart": "unexpected", "startsecs": "0"},
        )
        with self._supervisor() as server:
            _apply(server, only=name)
        return self.folder / "logs" / f"{name}.log"

    @property
    def _configuration(self) -> Path:
        return self.folder / "supervisord.conf"

    @property
    def _socket(self) -> Path:
        """Addresses of sockets are short, so it cannot lie in the folder."""
        digest = hashlib.sha256(str(self.folder).encode()).hexdigest()[:12]
        runtime = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
        return Path(runtime) / f"m1-{os.getuid()}-{digest}.sock"

    def _prepare(self, model: str | None) -> None:
        for name in ("secrets", "logs", "programs", "s3"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "secrets").chmod(0o700)
        for name in (ACCESS_KEY, SECRET_KEY):
            path = self.folder / "secrets" / name
            if not path.exists():
                write_secret(path, secrets.token_hex(20))
        claim_ports(self.folder)
        write_configuration(self.folder, self._socket)
        write_s3(self.folder, self.ports)
        write_mlflow(self.folder, self.ports, artifacts=f"s3://{BUCKET}/mlflow")
        if model is not None:
            serve = [sys.executable, "-m", "m1.cli", "serve", model, "--host", "127.0.0.1"]
            serve += ["--port", str(self.ports["inference"])]
            write_program(self.folder, "inference", serve, environment=self.environment())

    def _address(self, name: str) -> str:
        known = name in ("s3", "mlflow", "inference")
        return f"http://127.0.0.1:{self.ports[name]}" if known else ""

    def _is_answering(self, name: str) -> bool | None:
        address = self._address(name)
        if not address:
            return None
        path = "" if name == "s3" else "/health"
        try:
            urllib.request.urlopen(f"{address}{path}", timeout=3).close()
        except urllib.error.HTTPError as error:
            return name == "s3" and error.code == 403  # it asks for a signature
        except OSError:
            return False
        return True

    def _wait_until_answering(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            states = self.status()
            waiting = [s for s in states if s.is_answering is False]
            failed = [s for s in states if s.state == "FATAL"]
            if states and not waiting and not failed:
                return
            if failed or time.monotonic() > deadline:
                name = (failed or waiting)[0].name if states else "supervisord"
                raise M1Error(
                    f"{name} does not start; its words are in "
                    f"{self.folder / 'logs' / f'{name}.log'}. `m1 down` stops the rest"
                )
            time.sleep(0.5)

    def _make_bucket(self) -> None:
        from m1.storage import S3Storage
        from m1.storage.lifecycle import set_lifecycle

        with environment_of(self):
            storage = S3Storage(BUCKET, "")
            client = storage.connection.client
            if not storage.connection.call(lambda c: c.bucket_exists(BUCKET)):
                client.make_bucket(BUCKET)
            set_lifecycle(storage)

    def _is_running(self) -> bool:
        if not self._socket.exists():
            return False
        try:
            with self._supervisor() as server:
                return bool(server.supervisor.getState())
        except OSError:
            return False

    @contextlib.contextmanager
    def _supervisor(self) -> Iterator[Any]:
        from xmlrpc.client import ServerProxy

        _require("supervisor", "supervisor")
        from supervisor.xmlrpc import SupervisorTransport

        transport = SupervisorTransport(None, None, f"unix://{self._socket}")
        with ServerProxy("http://127.0.0.1", transport=transport) as server:
            yield server


@contextlib.contextmanager
def environment_of(services: Services) -> Iterator[None]:
    """Let this process and its children use the services, and no other keys, during the block."""
    ours = services.environment()
    hidden = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL")
    saved = {name: os.environ.get(name) for name in (*ours, *hidden)}
    for name in hidden:
        os.environ.pop(name, None)
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def as_dicts(states: Sequence[ServiceState]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(state) for state in states]


def _apply(server: Any, *, only: str | None) -> None:
    """Let supervisord read its programs anew and start those that are new, changed or ended."""
    added, changed, removed = server.supervisor.reloadConfig()[0]
    for name in changed + removed:
        server.supervisor.stopProcessGroup(name)
        server.supervisor.removeProcessGroup(name)
    for name in added + changed:
        server.supervisor.addProcessGroup(name)  # which starts it
    for program in server.supervisor.getAllProcessInfo():
        is_meant = only in (None, program["name"]) and program["name"] not in added + changed
        # A training run that ended is started again only when it is asked for.
        is_service = program["name"] in ("s3", "mlflow", "inference") or only is not None
        if is_meant and is_service and program["statename"] in ("STOPPED", "EXITED", "FATAL"):
            server.supervisor.startProcess(program["name"], False)


def _require(module: str, package: str) -> None:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise M1Error(f"services need the Python package {package}; pip install 'm1[services]'")
