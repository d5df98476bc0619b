"""`m1 ui`: MLflow's web page on the lineage store."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from rich.console import Console

from m1.types import M1Error

_START_SECONDS = 120
_STOP_SECONDS = 10


def serve(uri: str, root: Path, port: int = 5000, *, console: Console | None = None) -> None:
    """Run `mlflow server` until Ctrl-C (or SIGTERM); says the address once it answers.

    Call it from the main thread: it handles signals.

    Args:
        uri: MLflow tracking URI of a database, such as `sqlite:////path/mlflow.db`.
        root: Run root; artifacts of new experiments go below its `mlartifacts`.
        port: Port on 127.0.0.1.
        console: Where to print.

    Raises:
        M1Error: If `uri` is a server already, the port is taken, or the server ends by itself.
    """
    console = console or Console()
    if uri.startswith(("http://", "https://")):
        raise M1Error(f"Lineage is kept by the server at {uri}; open that address in a browser.")
    _require_free(port)
    root.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--backend-store-uri", uri]
    command += ["--artifacts-destination", str(root.resolve() / "mlartifacts")]
    # Without its job runner MLflow needs one process instead of ten.
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment = quiet | os.environ
    console.print("Starting MLflow (10 s or more) ...")
    # Its own session: signals reach us alone, and we end the server with its workers.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        _wait_until_it_answers(process, port)
        console.print(f"MLflow: http://127.0.0.1:{port}   (Ctrl-C stops it)")
        process.wait()
        raise M1Error(f"mlflow server ended with status {process.returncode}; its log is above.")
    except KeyboardInterrupt:
        console.print("Stopped.")
    finally:
        _stop(process)


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        # As the server will: a port whose last connections are still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            message = f"Port {port} cannot be used ({error.strerror}); pass another."
            raise M1Error(message) from error


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise M1Error(
                f"mlflow server ended with status {process.returncode}; its log is above."
            )
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        except OSError:
            time.sleep(0.3)
    raise M1Error(f"mlflow server did not answer within {_START_SECONDS} s; see its log above.")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=_STOP_SECONDS)
            return
        except subprocess.TimeoutExpired:
            continue
