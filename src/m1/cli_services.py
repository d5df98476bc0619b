"""`m1 up | down | status`: the services of the profile one-machine."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from m1.services import Services, ServiceState, as_dicts

Root = Annotated[Path, typer.Option(help="Run root; services keep their data below it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def up(
    root: Root = Path("runs"),
    model: Annotated[
        str | None, typer.Option(help="Folder or checkpoint that an inference server serves.")
    ] = None,
) -> None:
    """Start an S3 server, MLflow and, with a model, an inference server; wait for answers."""
    console = Console()
    console.print("Starting services (20 s or more) ...")
    _show(Services(root).up(model=model), console)
    console.print(f"m1 run RECIPE --profile one-machine --set storage.root={root}", soft_wrap=True)


def down(root: Root = Path("runs")) -> None:
    """Stop the services; what they store stays."""
    stopped = Services(root).down()
    Console().print("Stopped." if stopped else "Nothing runs.")


def status(root: Root = Path("runs"), as_json: Json = False) -> None:
    """Say which services run and answer; status 1 when one does not."""
    states = Services(root).status()
    if as_json:
        typer.echo(json.dumps(as_dicts(states), indent=2))
    elif states:
        _show(states, Console())
    else:
        Console().print("No services run here; start them with m1 up.")
    if not states or any(state.is_answering is False for state in states):
        raise typer.Exit(1)


def _show(states: list[ServiceState], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("service", "state", "answers", "address", ""):
        table.add_column(title)
    for state in states:
        answers = {True: "yes", False: "no", None: ""}[state.is_answering]
        table.add_row(state.name, state.state.lower(), answers, state.address, state.detail)
    console.print(table)
