"""An `m1 serve` of a run's SFT model, for stages that sample from a given server."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx

from m1.config.schema import Recipe
from m1.model.hf.checkpoints import model_toml
from m1.types import Pointer


@contextlib.contextmanager
def serve_policy(folder: Path, recipe: Recipe, stages: Mapping[str, Pointer]) -> Iterator[str]:
    folder.mkdir()
    (folder / "checkpoint").symlink_to(Path(stages["sft"].uri) / "checkpoint")
    (folder / "model.toml").write_text(model_toml(recipe.model))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from m1.cli import main; main()", "serve", str(folder)]
    command += ["--tokenizer", str(Path(stages["data"].uri) / "tokenizer"), "--port", str(port)]
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health", timeout=2).is_success:
                    yield url
                    return
            time.sleep(0.1)
        raise RuntimeError(f"m1 serve did not come up: {log.read_text()[-3000:]}")
    finally:
        process.kill()
        process.wait()
