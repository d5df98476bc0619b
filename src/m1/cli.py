"""The command line: `m1 run | stage | compile | plan | convert | serve | chat | ui ...`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from m1 import (
    cli_chat,
    cli_ci,
    cli_cluster,
    cli_convert,
    cli_curate,
    cli_grade,
    cli_lineage,
    cli_plan,
    cli_recipe,
    cli_rollouts,
    cli_sandbox,
    cli_sandbox_swe,
    cli_serve,
    cli_services,
)
from m1.config.loading import load_recipe
from m1.config.schema import Recipe
from m1.profiles import Profile, use_profile
from m1.types import M1Error

app = typer.Typer(
    name="m1",
    help="Train long-thinking models: data, pretraining, SFT, RL with CISPO, evaluation, lineage.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_recipe.app, name="recipe")
cli_sandbox_swe.register(cli_sandbox.app)
app.add_typer(cli_sandbox.app, name="sandbox")
app.add_typer(cli_rollouts.app, name="rollouts")
app.add_typer(cli_ci.app, name="ci")
app.command(name="plan")(cli_plan.plan)
app.command()(cli_convert.convert)
app.command()(cli_convert.tokenizer)
app.command()(cli_serve.serve)
app.command()(cli_chat.chat)
app.command()(cli_grade.grade)
app.command()(cli_curate.curate)
app.command()(cli_curate.calibrate)
cli_cluster.register(app)
app.command()(cli_lineage.lineage)
app.command()(cli_services.up)
app.command()(cli_services.down)
app.command()(cli_services.status)

Recipes = Annotated[
    list[Path], typer.Argument(help="Recipe files, merged left to right.", metavar="RECIPE...")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one value, such as rl.loss.clip_eps_high=4.0."),
]
ProfileOption = Annotated[
    Profile,
    typer.Option(envvar="M1_PROFILE", help="Where artifacts and lineage go; see m1 up."),
]


def main() -> None:
    """Run the command line; a mistake that the user can mend ends with its message and status 1."""
    try:
        app()
    except M1Error as error:
        Console(stderr=True).print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
        sys.exit(1)


@app.command()
def run(
    recipe: Recipes,
    overrides: Overrides = None,
    profile: ProfileOption = Profile.LAPTOP,
    detach: Annotated[
        bool,
        typer.Option(help="Run under the supervisor of m1 up, which restarts it when it dies."),
    ] = False,
) -> None:
    """Run a recipe's whole pipeline on this machine; finished stages are not repeated."""
    from m1.pipeline import run_pipeline

    resolved = _load(recipe, overrides)
    with use_profile(profile, resolved) as placed:
        if detach:
            _detach(recipe, overrides, profile, resolved)
        else:
            run_pipeline(placed, console=_console())


@app.command()
def stage(
    name: Annotated[
        str,
        typer.Argument(
            help="data, sandbox, pretrain, sft, rl (with lengths rl_40960, ...), evaluate or "
            "register."
        ),
    ],
    recipe: Recipes,
    overrides: Overrides = None,
    profile: ProfileOption = Profile.LAPTOP,
) -> None:
    """Run one stage alone; the stages before it must be done."""
    from m1.pipeline import run_single_stage

    with use_profile(profile, _load(recipe, overrides)) as placed:
        run_single_stage(name, placed, console=_console())


@app.command(name="compile")
def compile_(
    recipe: Recipes,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path(
        "pipeline.yaml"
    ),
    overrides: Overrides = None,
    only: Annotated[str, typer.Option(help="data, rl or evaluate; absent: all stages.")] = "",
    manifests: Annotated[
        str, typer.Option(metavar="NAMESPACE", help="Write Pipeline and PipelineVersion objects.")
    ] = "",
) -> None:
    """Write the pipeline as KFP IR YAML, or as manifests for kubectl and GitOps."""
    from m1.pipeline import load_pipelines

    compiling, loaded = load_pipelines("compile"), _load(recipe, overrides)
    if manifests:
        compiling.compile_manifests(loaded, output, only, namespace=manifests)
    else:
        compiling.compile_pipeline(loaded, output, only)
    Console().print(f"wrote {output}")


@app.command()
def ui(
    root: Annotated[Path, typer.Option(help="Run root.")] = Path("runs"),
    port: Annotated[int, typer.Option(help="Port on localhost.")] = 5000,
) -> None:
    """Serve the lineage store and print its address."""
    from m1.config.schema import TrackingConfig
    from m1.tracking.lineage import tracking_uri
    from m1.ui import serve

    serve(tracking_uri(TrackingConfig(), root), root, port)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what this machine can do, and what is missing for the rest."""
    from dataclasses import asdict

    from m1.doctor import examine, render

    findings = examine()
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        render(findings, Console())


def _console() -> Console:
    """A console bound to today's stdout: while a pipeline runs, stdout is redirected to its log."""
    return Console(file=sys.stdout)


def _detach(
    paths: list[Path], overrides: list[str] | None, profile: Profile, recipe: Recipe
) -> None:
    from m1.services import Services

    if profile is not Profile.ONE_MACHINE:
        raise M1Error("--detach needs the supervisor of m1 up; pass --profile one-machine too")
    command = [sys.executable, "-m", "m1.cli", "run", *(str(path.resolve()) for path in paths)]
    command += ["--profile", profile.value]
    command += [word for override in overrides or [] for word in ("--set", override)]
    is_remote = recipe.storage.root.startswith("s3://")
    services = Services(Path(recipe.storage.scratch if is_remote else recipe.storage.root))
    log = services.start_program(f"run-{recipe.name}", command)
    _console().print(f"runs under the supervisor (m1 status); log {log}", soft_wrap=True)


def _load(paths: list[Path], overrides: list[str] | None) -> Recipe:
    return load_recipe(paths, overrides=overrides or [])


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
