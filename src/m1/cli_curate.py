"""`m1 curate`: tasks fit for RL from sets that are not yet. `m1 calibrate`: useful difficulties."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def curate(
    settings: Annotated[Path, typer.Argument(help="TOML file: inputs, filters, thresholds.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Filter, deduplicate and decontaminate tasks; writes them with a card and a funnel chart."""
    from m1.curate.files import curate_files  # needs more than the base install
    from m1.curate.settings import CurateConfig, read_settings

    console = Console()
    config = read_settings(settings, CurateConfig, holds="[[inputs]]")
    card = curate_files(config, output, report=lambda step: console.print(f"  {step}"))
    table = Table("step", "left")
    for row in card["funnel"]:
        table.add_row(row["step"], str(row["left"]))
    console.print(table)
    console.print(
        f"{card['num_kept']} kept, {card['num_dropped']} dropped, {card['num_opened']} made open; "
        f"wrote {output}"
    )


def calibrate(
    settings: Annotated[Path, typer.Argument(help="TOML file: [base] and [strong] models, tasks.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Sample models on logic tasks and find the difficulties that are worth training on."""
    from m1.curate.calibration import CalibrateConfig
    from m1.curate.calibration_files import calibrate_files
    from m1.curate.settings import read_settings

    console = Console()
    config = read_settings(settings, CalibrateConfig, holds="a [base] model")
    table = calibrate_files(config, output, report=lambda cell: console.print(f"  {cell}"))
    shown = Table("task", "useful difficulties")
    for name, difficulties in table.items():
        shown.add_row(name, " ".join(map(str, difficulties)) or "none")
    console.print(shown)
    console.print(f"wrote {output}")
