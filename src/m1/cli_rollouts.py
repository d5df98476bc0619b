"""`m1 rollouts`: what a policy wrote during RL, and what it was given for it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from m1.rollout.find import rollout_folders
from m1.rollout.traces import StoredRollout, read_step, steps_in
from m1.types import M1Error

app = typer.Typer(help="Rollouts of an RL run.", no_args_is_help=True)


@app.callback()
def rollouts() -> None:
    """Rollouts of an RL run."""


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="Folder of a run or of an RL stage.")],
    step: Annotated[int | None, typer.Option(help="RL step, from 1; default: the last.")] = None,
    task: Annotated[str | None, typer.Option(help="Task id; default: the step's first.")] = None,
    index: Annotated[int, typer.Option(help="Number in its group, from 0.")] = 0,
    stage: Annotated[
        str | None, typer.Option(help="RL stage, such as rl_40960; default: the last.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every column as JSON.")] = False,
) -> None:
    """Print one rollout: prompt, completion, rewards by part, versions of the weights."""
    folders = rollout_folders(run)
    name = list(folders)[-1] if stage is None else stage
    if name not in folders:
        raise M1Error(f"stage {name!r} kept no rollouts in {run}; those of {', '.join(folders)}")
    steps = steps_in(folders[name])
    found = read_step(folders[name], steps[-1] if step is None else step, task=task, index=index)
    if as_json:
        typer.echo(json.dumps(asdict(found[0]), ensure_ascii=False))
    else:
        _print(found[0], name, steps)


def _print(rollout: StoredRollout, stage: str, steps: list[int]) -> None:
    console = Console()
    table = Table(show_header=False, box=None)
    for name, value in _facts(rollout, stage, steps):
        table.add_row(Text(name, style="dim"), Text(value))
    console.print(table)
    for title, text in (("prompt", rollout.prompt), ("completion", rollout.text)):
        console.print(Rule(title, align="left"))
        console.print(Text(text))
    console.print(Rule("reference", align="left"))
    console.print(Text(rollout.reference))


def _facts(rollout: StoredRollout, stage: str, steps: list[int]) -> list[tuple[str, str]]:
    versions = sorted(set(rollout.policy_versions))
    shown = f"{versions[0]} to {versions[-1]}" if len(versions) > 1 else "".join(map(str, versions))
    parts = ", ".join(f"{name} {value:g}" for name, value in rollout.parts.items())
    reward = "the verifier failed" if rollout.is_failed else f"{rollout.reward:g} ({parts})"
    place = f"{rollout.step} of {len(steps)} kept (to {steps[-1]})"
    return [
        ("stage", stage),
        ("step", place),
        ("task", f"{rollout.task_id} from {rollout.source}"),
        ("group, index", f"{rollout.group}, {rollout.index}"),
        ("accuracy", f"{rollout.accuracy:g}"),
        ("reward", reward),
        ("tokens", f"{len(rollout.tokens)} after {len(rollout.prompt_tokens)} of prompt"),
        ("finish reason", rollout.finish_reason),
        ("policy versions", shown),
        ("trained on", "yes" if rollout.is_kept else "no"),
    ]
