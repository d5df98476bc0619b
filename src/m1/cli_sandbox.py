"""`m1 sandbox exec | gc | doctor`: one command in a sandbox, and the state of the backends."""

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from m1.sandbox import bubblewrap, opening
from m1.sandbox.base import Environment, Limits, SandboxError, printable
from m1.sandbox.pods import ClusterConfig
from m1.types import M1Error

app = typer.Typer(no_args_is_help=True, help="Sandboxes for programs that nobody trusts.")

BackendName = Annotated[str, typer.Option(help=" | ".join(opening.BACKENDS))]
Namespace = Annotated[str, typer.Option(help="Of the cluster.")]
Kubeconfig = Annotated[str | None, typer.Option(help="File; otherwise KUBECONFIG or the pod's.")]
Image = Annotated[str, typer.Option(help="Folder (local) or OCI reference (cluster).")]


@app.command(name="exec", context_settings={"ignore_unknown_options": True})
def exec_(
    command: Annotated[list[str], typer.Argument(help="After --: program and arguments.")],
    backend: BackendName = "bubblewrap",
    image: Image = "",
    layer: Annotated[
        list[str] | None, typer.Option(help="/path/inside=folder; copy-on-write; repeatable.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Wall time; processor time is the same.")
    ] = 60.0,
    memory_mib: Annotated[int, typer.Option(min=8, help="All processes together.")] = 512,
    scratch_mib: Annotated[int, typer.Option(min=1, help="All that may be written.")] = 256,
    lenient: Annotated[bool, typer.Option(help="Accept a weaker sandbox; see doctor.")] = False,
    namespace: Namespace = "m1-sandbox",
    kubeconfig: Kubeconfig = None,
) -> None:
    """Run one command in a fresh sandbox; its output and status are this command's."""
    limits = replace(
        Limits(), cpu_seconds=seconds, wall_seconds=seconds, memory_mib=memory_mib,
        scratch_mib=scratch_mib,
    )  # fmt: skip
    environment = Environment(image=image, layers=_layers(layer or []))
    try:
        opened = _backend(backend, namespace, kubeconfig, is_strict=not lenient).open(
            environment, limits=limits
        )
        with opened as sandbox:
            result = sandbox.exec(command, stdin=_input(), on_output=_show)
    except SandboxError as error:
        raise M1Error(str(error)) from error
    if result.stopped_by is not None:
        typer.echo(f"stopped by its limit: {result.stopped_by}", err=True)
    raise typer.Exit(result.exit_code)


@app.command()
def gc(
    backend: BackendName = "bubblewrap",
    namespace: Namespace = "m1-sandbox",
    kubeconfig: Kubeconfig = None,
) -> None:
    """Remove what sandboxes of dead or late owners left."""
    try:
        number = _backend(backend, namespace, kubeconfig, is_strict=False).collect_garbage()
    except SandboxError as error:
        raise M1Error(str(error)) from error
    typer.echo(f"removed {number}")


@dataclass(frozen=True)
class BackendState:
    """What one backend can do here."""

    backend: str
    is_usable: bool
    detail: str
    weaknesses: tuple[str, ...] = ()
    start_seconds: float | None = None
    """From asking to the end of a first command."""


@app.command()
def doctor(
    namespace: Namespace = "m1-sandbox",
    kubeconfig: Kubeconfig = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Open one sandbox of every backend, and say what works and what is weaker than it should."""
    states = [_examine(name, namespace, kubeconfig) for name in opening.BACKENDS]
    if as_json:
        typer.echo(json.dumps([asdict(state) for state in states], indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("backend", "", "start", "found"):
        table.add_column(column)
    for state in states:
        start = "" if state.start_seconds is None else f"{1000 * state.start_seconds:.0f} ms"
        found = "\n".join((state.detail, *state.weaknesses))
        table.add_row(state.backend, "ok" if state.is_usable else "missing", start, found)
    Console().print(table)


def _examine(name: str, namespace: str, kubeconfig: str | None) -> BackendState:
    try:
        backend = _backend(name, namespace, kubeconfig, is_strict=False, patience=10.0)
        started = time.monotonic()
        with backend.open() as sandbox:
            sandbox.exec(["true"])
            took = time.monotonic() - started
            reach = sandbox.exec(["sh", "-c", "cat /proc/net/route | tail -n +2 | wc -l"])
    except Exception as error:  # a doctor reports what it meets, whatever it is
        return BackendState(name, False, printable(str(error)[:300].encode()))
    weak = bubblewrap.weaknesses() if name == "bubblewrap" else ()
    if name != "bubblewrap":
        weak = _cluster_weaknesses(name, namespace, kubeconfig)
        if reach.stdout.strip() not in (b"0", b"1"):
            weak = (*weak, "the pod has routes: only the network plugin's policies isolate it")
    program = bubblewrap.find_bubblewrap() if name == "bubblewrap" else f"namespace {namespace}"
    return BackendState(name, True, str(program), tuple(weak), took)


def _cluster_weaknesses(name: str, namespace: str, kubeconfig: str | None) -> tuple[str, ...]:
    try:
        _backend(name, namespace, kubeconfig, is_strict=True, patience=10.0)
    except SandboxError as error:
        return (str(error),)
    return ()


def _backend(
    name: str,
    namespace: str,
    kubeconfig: str | None,
    *,
    is_strict: bool,
    patience: float | None = None,
) -> Any:
    config = ClusterConfig(namespace=namespace, kubeconfig=kubeconfig)
    if patience is not None:
        config = replace(config, retry_seconds=patience, start_seconds=3 * patience)
    return opening.open_backend(name, cluster=config, is_strict=is_strict)


def _layers(texts: list[str]) -> dict[str, Path]:
    layers = {}
    for text in texts:
        path, separator, folder = text.partition("=")
        if not separator:
            raise M1Error(f"--layer {text!r} must be /path/inside=folder")
        layers[path] = Path(folder).resolve()
    return layers


def _input() -> bytes:
    return b"" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read()


def _show(name: str, data: bytes) -> None:
    """Write to the same stream; to a terminal only what cannot steer it."""
    stream = sys.stdout if name == "stdout" else sys.stderr
    if stream.isatty():
        stream.write(printable(data))
    else:
        stream.buffer.write(data)
    stream.flush()
