"""`m1 ci`: what a change of recipes does, for pull requests and merges."""

from pathlib import Path
from typing import Annotated

import typer

from m1.pipeline import load_pipelines
from m1.recipe_changes import RECIPES, recipe_changes, report, to_submit
from m1.types import M1Error

app = typer.Typer(no_args_is_help=True, help="Recipes in continuous integration.")

Base = Annotated[str, typer.Option(help="Commit to compare with.")]
Head = Annotated[str, typer.Option(help="Commit with the change.")]
Pattern = Annotated[str, typer.Option("--recipes", help="Files that are recipes, git's glob.")]


@app.command()
def check(
    base: Base = "origin/main",
    head: Head = "HEAD",
    pattern: Pattern = RECIPES,
    comment: Annotated[Path | None, typer.Option(help="File for the Markdown.")] = None,
) -> None:
    """Validate changed recipes; say which stages re-run and what they cost."""
    changes = recipe_changes(base, head, folder=Path.cwd(), pattern=pattern)
    text = report(changes)
    if comment is not None:
        comment.write_text(text, encoding="utf-8")
    typer.echo(text, nl=False)
    invalid = [change.path for change in changes if change.mistake]
    if invalid:
        raise M1Error(f"these recipes are invalid: {', '.join(invalid)}; see above")


@app.command()
def submit(
    base: Base,
    head: Head = "HEAD",
    pattern: Pattern = RECIPES,
    retry_seconds: Annotated[float, typer.Option(min=0)] = 60.0,
) -> None:
    """Submit changed recipes with `ci.submit`, once for each content; the server by M1_KFP_*."""
    recipes = to_submit(recipe_changes(base, head, folder=Path.cwd(), pattern=pattern))
    if not recipes:
        typer.echo("no changed recipe asks to be submitted")
        return
    servers, submitting = load_pipelines("server"), load_pipelines("submit")
    server = servers.KfpServer(servers.connection(retry_seconds=retry_seconds))
    for recipe in recipes:
        made = submitting.submit(recipe, server, submitting.Order(once=True))
        state = "started" if made.is_started else "has run before"
        typer.echo(f"{recipe.name}: {made.version} {state}: {made.url}")
