"""`m1 submit`, `runs`, `logs`, `cancel`: runs on a KFP server."""

import os
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console

from m1.config.loading import load_recipe
from m1.config.schema import Recipe
from m1.pipeline import load_pipelines
from m1.types import M1Error

Run = Annotated[str, typer.Argument(metavar="RUN", help="Id of a run, or its name.")]


@dataclass(frozen=True)
class ServerOptions:
    """Where the KFP server is and who asks, as options of a command; empty: the environment's."""

    host: Annotated[str, typer.Option(help="Address of the KFP server; also M1_KFP_HOST.")] = ""
    ui: Annotated[str, typer.Option(help="Address of the UI, where it differs.")] = ""
    namespace: Annotated[str, typer.Option(help="Namespace of a multi-user server.")] = ""
    token_file: Annotated[
        str,
        typer.Option(
            help="File with a bearer token, such as a service account's; also M1_KFP_TOKEN_FILE. A "
            "token itself comes by M1_KFP_TOKEN."
        ),
    ] = ""
    cookies_file: Annotated[
        str, typer.Option(help="File with the Cookie header of a login; also M1_KFP_COOKIES_FILE.")
    ] = ""
    ca_file: Annotated[str, typer.Option(help="Certificate authority of the server.")] = ""
    retry_seconds: Annotated[
        float, typer.Option(help="How long an absent server is asked again.", min=0)
    ] = 60.0

    def open(self) -> Any:
        """The KfpServer of `pipelines/server.py`; nothing is asked yet.

        Raises:
            M1Error: No server is named, or a file cannot be read.
        """
        module: ModuleType = load_pipelines("server")
        return module.KfpServer(module.connection(**asdict(self)))


def with_server_options(
    *, without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Show a command's parameter `options` to typer as the fields of `ServerOptions`, in its place.

    Args:
        without: Fields that the command does not offer; they keep their default.
    """
    offered = {
        field.name: Parameter(
            field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
        )
        for field in fields(ServerOptions)
        if field.name not in without
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        shown: list[Parameter] = []
        for name, parameter in signature(command).parameters.items():
            own = parameter.replace(kind=Parameter.KEYWORD_ONLY)
            shown += offered.values() if name == "options" else [own]

        def call(**given: Any) -> None:
            options = ServerOptions(**{name: given.pop(name) for name in offered})
            command(options=options, **given)

        call.__name__, call.__doc__ = command.__name__, command.__doc__
        call.__annotations__ = {p.name: p.annotation for p in shown}
        call.__signature__ = Signature(shown)  # type: ignore[attr-defined]
        return call

    return decorate


@with_server_options()
def submit(
    recipe: Annotated[
        list[Path], typer.Argument(metavar="RECIPE...", help="TOML files, merged left to right.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a field; makes a new version."),
    ] = None,
    only: Annotated[str, typer.Option(help="data, rl or evaluate; absent: all stages.")] = "",
    checkpoint: Annotated[str, typer.Option(help="Where rl or evaluate only begin.")] = "",
    name: Annotated[str, typer.Option(help="Of the run; absent: the version's.")] = "",
    priority: Annotated[
        str, typer.Option(help="Class of priority, in Kueue and of inference servers.")
    ] = "",
    pipeline_root: Annotated[str, typer.Option(help="Where KFP keeps artifacts.")] = "",
    service_account: Annotated[str, typer.Option(help="Of the run's pods.")] = "",
    once: Annotated[
        bool, typer.Option("--once", help="Start no second run of the same content.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end.")] = False,
    *,
    options: ServerOptions,
    poll_seconds: Annotated[float, typer.Option(help="Between looks of --wait.")] = 5.0,
) -> None:
    """Run a recipe's pipeline on a KFP server; a version is uploaded once for each content."""
    loaded = load_recipe(recipe, overrides=overrides or ())
    server = options.open()
    module = load_pipelines("submit")
    order = module.Order(
        only=only,
        checkpoint=checkpoint,
        run_name=name,
        priority=priority,
        pipeline_root=pipeline_root,
        service_account=service_account,
        once=once,
    )
    console = Console()
    made = module.submit(loaded, server, order)
    state = "uploaded" if made.is_uploaded else "on the server already"
    console.print(f"version  {made.version} ({state})", soft_wrap=True)
    console.print(f"run      {made.run_id}{'' if made.is_started else ' (of before)'}")
    console.print(f"UI       {made.url}", soft_wrap=True)
    console.print(f"MLflow   {_mlflow(loaded)}", soft_wrap=True)
    if wait:
        _wait(server, made.run_id, console, poll_seconds)


@with_server_options(without=("ui",))
def runs(
    number: Annotated[int, typer.Option("--number", "-n", help="How many.", min=1)] = 20,
    *,
    options: ServerOptions,
) -> None:
    """List the newest runs of a KFP server."""
    server = options.open()
    module = load_pipelines("follow")
    Console().print(module.runs_table(module.list_runs(server, page_size=number)))


@with_server_options(without=("ui",))
def logs(
    run: Run,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="Such as rl.")],
    pods_namespace: Annotated[str, typer.Option(help="Where the run's pods are.")] = "kubeflow",
    *,
    options: ServerOptions,
) -> None:
    """Print the log of a stage, and of the TrainJob it made; needs access to the cluster."""
    from m1.launcher.cluster import Cluster

    server = options.open()
    module = load_pipelines("follow")
    run_id = module.find_run(server, run)
    task = module.task_of(server, run_id, stage)
    cluster = Cluster(options.namespace or pods_namespace, retry_seconds=options.retry_seconds)
    lines = cluster.calling(
        lambda: list(
            module.stage_logs(cluster.core, cluster.namespace, run_id, task=task, stage=stage)
        )
    )
    for line in lines or ():
        typer.echo(line)


@with_server_options(without=("ui",))
def cancel(
    run: Run,
    *,
    options: ServerOptions,
) -> None:
    """End a run; its stages can be gone on with by another."""
    server = options.open()
    run_id = load_pipelines("follow").find_run(server, run)
    server.write(lambda client: client.terminate_run(run_id))
    Console().print(f"cancelling {run_id}")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (submit, runs, logs, cancel):
        app.command()(command)


def _wait(server: Any, run_id: str, console: Console, poll_seconds: float) -> None:
    module = load_pipelines("follow")
    state = module.follow(server, run_id, console=console, poll_seconds=poll_seconds)
    if state not in ("SUCCEEDED", "SKIPPED"):
        raise M1Error(f"run {run_id} ended {state}: {module.failure_of(server, run_id)}")


def _mlflow(recipe: Recipe) -> str:
    """Where lineage goes, without credentials that an address may hold."""
    from urllib.parse import urlsplit

    uri = os.environ.get("MLFLOW_TRACKING_URI") or recipe.tracking.uri
    if not uri:
        return "where the cluster's MLFLOW_TRACKING_URI says"
    parts = urlsplit(uri)
    shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return f"{shown} (experiment {recipe.tracking.experiment})"
