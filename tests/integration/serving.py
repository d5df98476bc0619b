"""Servers for tests: in this process for special limits, as a process for signals."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import uvicorn

from m1.inference.core import EngineCore
from m1.inference.limits import EngineLimits
from m1.inference.loop import EngineLoop
from m1.inference.server.app import ServerLimits, create_app
from m1.inference.text import TextTokenizer


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass
class LocalServer:
    """A server in a thread, with its engine in reach."""

    url: str
    loop: EngineLoop
    tokenizer: TextTokenizer
    model_name: str = "tiny"
    headers: dict[str, str] = field(default_factory=dict)

    def post(self, path: str, body: object = None, **options) -> httpx.Response:
        options = {"json": body, "headers": self.headers, "timeout": 120} | options
        return httpx.post(self.url + path, **options)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=self.headers, timeout=30)


@contextlib.contextmanager
def local_server(
    model, folder: Path, *, max_waiting: int = 1000, limits: ServerLimits | None = None, **sizes
) -> Iterator[LocalServer]:
    tokenizer = TextTokenizer(folder)
    engine = EngineLimits(**({"num_slots": 64, "num_pages": 2000, "page_size": 8} | sizes))
    core = EngineCore(model, num_tokens=tokenizer.vocab_size, limits=engine, tokenizer=tokenizer)
    loop = EngineLoop(core, model, max_waiting=max_waiting)
    limits = limits or ServerLimits()
    app = create_app(loop, tokenizer, model_name="tiny", limits=limits)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    loop.start()
    thread.start()
    while not server.started:
        time.sleep(0.01)
    headers = {"Authorization": f"Bearer {limits.token}"} if limits.token else {}
    try:
        yield LocalServer(f"http://127.0.0.1:{port}", loop, tokenizer, headers=headers)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        loop.stop()


@contextlib.contextmanager
def serve_process(
    folder: Path, *arguments: str, port: int | None = None, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`m1 serve` as users start it; yields when it answers."""
    port = port or free_port()
    command = [sys.executable, "-c", "from m1.cli import main; main()", "serve", str(folder)]
    command += ["--port", str(port), "--model-name", "tiny", *arguments]
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_up(url, process)
        yield process, url
    finally:
        process.kill()
        process.wait()


def wait_until_up(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=2).is_success:
                return
        time.sleep(0.1)
    process.kill()
    raise RuntimeError(f"m1 serve did not come up:\n{process.communicate()[0][-3000:]}")
