"""`m1 recipe`: show a resolved recipe, compare two, print the schema of the file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from m1.config.loading import (
    json_schema,
    load_recipe,
    recipe_json,
)
from m1.config.recipe_diff import ABSENT, StageChange, explain_diff

app = typer.Typer(no_args_is_help=True, help="Show, compare and document recipes.")

_STAGE_WIDTH = 10
_STATUS_WIDTH = 11

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field, such as rl.group_size=8."),
]


@app.command()
def show(
    recipes: Annotated[
        list[Path], typer.Argument(metavar="RECIPE...", help="TOML files, merged left to right.")
    ],
    overrides: Overrides = None,
) -> None:
    """Print the recipe as JSON with every default resolved."""
    typer.echo(recipe_json(load_recipe(recipes, overrides=overrides or ())))


@app.command()
def diff(
    old: Annotated[Path, typer.Argument(metavar="A", help="The recipe to start from.")],
    new: Annotated[Path, typer.Argument(metavar="B", help="The recipe to compare; may be A.")],
    overrides: Overrides = None,
) -> None:
    """Print which stages B would run again after A, and why; --set changes B only."""
    changes = explain_diff(load_recipe([old]), load_recipe([new], overrides=overrides or ()))
    typer.echo(_row("stage", "status", "why"))
    for change in changes:
        stage, status = change.stage, str(change.status)
        for reason in _reasons(change) or [""]:
            typer.echo(_row(stage, status, reason))
            stage = status = ""


@app.command()
def schema(
    write: Annotated[Path | None, typer.Option(help="File to write instead of printing.")] = None,
) -> None:
    """Print the JSON schema of recipe files, for editors and other tools."""
    text = json_schema()
    if write is None:
        typer.echo(text, nl=False)
    else:
        write.write_text(text, encoding="utf-8")


def _row(stage: str, status: str, reason: str) -> str:
    return f"{stage:{_STAGE_WIDTH}}{status:{_STATUS_WIDTH}}{reason}".rstrip()


def _reasons(change: StageChange) -> list[str]:
    """Fields that differ, then the parents that change; empty for a stage that stays."""
    reasons = [f"{f.path}: {_plain(f.old)} -> {_plain(f.new)}" for f in change.fields]
    if change.parents:
        verb = "changes" if len(change.parents) == 1 else "change"
        reasons.append(f"because {', '.join(change.parents)} {verb}")
    return reasons


def _plain(value: Any) -> str:
    """A JSON value in the words of the diff: `absent` where a recipe has none."""
    return "absent" if value is ABSENT or value is None else str(value)
