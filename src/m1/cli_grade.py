"""`m1 grade`: rewards for a file of completions."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from m1.rewards.grade import GradeSummary, grade_file
from m1.rewards.service.pool import ServiceConfig


def grade(
    source: Annotated[
        Path, typer.Argument(help="JSONL: completion, and task or verifier and reference.")
    ],
    target: Annotated[Path, typer.Argument(help="JSONL to write, in the same order.")],
    workers: Annotated[int, typer.Option(help="Worker processes; 0: one for each core.")] = 0,
    format_weight: Annotated[
        float, typer.Option(help="Added for <think>...</think><answer>...</answer>.")
    ] = 0.0,
) -> None:
    """Grade completions: adds reward, parts, reason, seconds and infra_error to every line."""
    summary = grade_file(
        source, target, config=ServiceConfig(num_workers=workers), format_weight=format_weight
    )
    _show(summary, target)


def _show(summary: GradeSummary, target: Path) -> None:
    table = Table("reason", "lines")
    for reason, count in summary.reasons.items():
        table.add_row(reason, str(count))
    console = Console()
    console.print(table)
    mean = "none" if summary.mean_reward is None else f"{summary.mean_reward:.4f}"
    console.print(
        f"{summary.num_lines} lines, mean reward {mean}, "
        f"{summary.num_infra_errors} infrastructure errors; wrote {target}"
    )
