"""`m1 plan`: what a recipe will need, before it runs."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from m1.config.loading import load_recipe
from m1.plan.cost import DEFAULT_GPU, DEFAULT_MFU, PAPER_PRICE
from m1.plan.display import render
from m1.plan.report import Options, Plan, make_plan, plan_json
from m1.types import M1Error


def plan(
    recipe: Annotated[
        list[Path], typer.Argument(metavar="RECIPE...", help="TOML files, merged left to right.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a field of the recipe."),
    ] = None,
    stage: Annotated[str, typer.Option(help="pretrain, sft, rl or rl_40960.")] = "pretrain",
    gpu: Annotated[str, typer.Option(help="h800, h100 or h200.")] = DEFAULT_GPU,
    mfu: Annotated[
        float, typer.Option(help="Share of the peak that model FLOPs reach.")
    ] = DEFAULT_MFU,
    price: Annotated[
        float, typer.Option("--price-per-gpu-hour", help="Dollars; default: the paper's rent.")
    ] = round(PAPER_PRICE, 2),
    sequences: Annotated[
        int | None, typer.Option(help="Sequences decoded together on one replica.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of each of them.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw FLOPs against length (Fig. 1).")
    ] = None,
) -> None:
    """Count parameters, memory, FLOPs, time and cost of one stage, before it runs."""
    options = Options(stage, gpu, mfu, price, sequences, length)
    made = make_plan(load_recipe(recipe, overrides=overrides or ()), options)
    if as_json:
        typer.echo(json.dumps(plan_json(made), indent=2))
    else:
        render(made, Console())
    if plot is not None:
        _draw(made, plot)


def _draw(made: Plan, path: Path) -> None:
    try:
        from m1.plan.figure import draw_generation
    except ModuleNotFoundError as error:
        raise M1Error(f"--plot needs {error.name}; install m1[eval]") from None
    draw_generation(made.recipe.model, made.recipe.name, path)
    Console(stderr=True).print(f"wrote {path}")
