"""MLflow's records in PostgreSQL: as the manifests address it, and under `m1 up`."""

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from m1.services import Services
from m1.tracking.store import open_client

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]
ROOT = Path(__file__).parents[2]
PASSWORD = "planted-secret-81c6"


def program(name):
    """A program of PostgreSQL, which Debian keeps beside the path."""
    beside = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    found = str(beside[-1]) if beside else shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}; install Debian's package postgresql")
    return found


@dataclass(frozen=True)
class Database:
    """A PostgreSQL server with an empty database `mlflow`."""

    port: int

    def uri(self):
        """As the container of MLflow has it."""
        text = (ROOT / "manifests" / "base" / "mlflow" / "server.yaml").read_text()
        (deployment,) = [i for i in yaml.safe_load_all(text) if i["kind"] == "Deployment"]
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        values = {e["name"]: e.get("value") for e in container["env"]}
        return (
            values["MLFLOW_BACKEND_STORE_URI"]
            .replace("$(POSTGRES_PASSWORD)", PASSWORD)
            .replace("mlflow-postgres:5432", f"127.0.0.1:{self.port}")
        )

    def rows(self, query):
        import psycopg2

        place = {"host": "127.0.0.1", "port": self.port, "user": "mlflow", "password": PASSWORD}
        with psycopg2.connect(dbname="mlflow", **place) as link, link.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetchall()


@pytest.fixture
def database():
    pytest.importorskip("psycopg2", reason="psycopg2-binary is in m1[ops]")
    initdb, postgres, createdb = (program(name) for name in ("initdb", "pg_ctl", "createdb"))
    folder = Path(tempfile.mkdtemp(prefix="m1-postgres-"))  # pytest's are root's alone
    as_user = {}
    if os.geteuid() == 0:  # which PostgreSQL refuses to run as
        user = pwd.getpwnam("postgres")
        as_user = {"user": user.pw_uid, "group": user.pw_gid}
        os.chown(folder, user.pw_uid, user.pw_gid)
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    data = str(folder / "data")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="

    def run(*command, **more):
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=120, **more
        )
        assert done.returncode == 0, done.stdout + done.stderr

    secret = f"--pwfile={folder / 'password'}"
    run(initdb, "-D", data, "-U", "mlflow", "--auth=scram-sha-256", secret, **as_user)
    start = [postgres, "-D", data, "-o", options, "-l", str(folder / "log"), "-w"]
    subprocess.run([*start, "start"], check=True, stdout=subprocess.DEVNULL, **as_user)
    try:
        where = ["--host", "127.0.0.1", "--port", str(port), "--username", "mlflow"]
        run(createdb, *where, "mlflow", env=os.environ | {"PGPASSWORD": PASSWORD})
        yield Database(port)
    finally:
        run(postgres, "-D", data, "-m", "fast", "stop", **as_user)
        shutil.rmtree(folder)


def test_mlflow_keeps_its_records_in_postgresql(database, m1, tmp_path):
    uri = {"MLFLOW_BACKEND_STORE_URI": database.uri()}
    # As the init container of the manifests does with a database that is empty.
    migrate = [sys.executable, "-m", "mlflow", "db", "upgrade", uri["MLFLOW_BACKEND_STORE_URI"]]
    done = subprocess.run(migrate, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]

    started = m1("up", "--root", str(tmp_path), **uri)
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        services = Services(tmp_path)
        client = open_client(services.mlflow_uri)
        run = client.create_run(client.create_experiment("postgres"))
        client.log_metric(run.info.run_id, "rl/reward", 0.5)
        client.set_terminated(run.info.run_id)
        kept = database.rows("select run_uuid, status from runs")
        assert kept == [(run.info.run_id, "FINISHED")]
        assert database.rows("select key, value from metrics") == [("rl/reward", 0.5)]
        assert not list(services.folder.glob("*.db"))
        files = [path for path in services.folder.rglob("*") if path.is_file()]
        assert not [path for path in files if PASSWORD.encode() in path.read_bytes()]
    finally:
        assert m1("down", "--root", str(tmp_path)).returncode == 0
