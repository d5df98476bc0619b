"""Difficulty calibration from a settings file to tables, a recipe fragment and a chart."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from m1.curate.calibration import (
    CalibrateConfig,
    Cell,
    Measured,
    Subject,
    calibrate,
    useful,
)
from m1.curate.pass_rate import PassRate, Sampler
from m1.curate.rate_store import RateStore
from m1.curate.settings import AnswererConfig
from m1.rewards.service.pool import RewardService
from m1.storage import atomic_write
from m1.types import M1Error

_INTERVAL = (0.025, 0.975)


def calibrate_files(
    config: CalibrateConfig,
    folder: Path,
    *,
    base: Sampler | None = None,
    strong: Sampler | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, list[int]]:
    """Measure, and write difficulties.json, tasks.toml and calibration.png; useful difficulties.

    Pass rates are kept in the folder's *_rates.jsonl as they are measured, and a run that was
    killed goes on from them.

    Args:
        config: What to measure.
        folder: Where the files go.
        base: In place of the model that `base` names.
        strong: In place of the model that `strong` names.
        report: Hears of every cell.

    Raises:
        M1Error: No base model is named, or one cannot be loaded.
    """
    if base is None and config.base is None:
        raise M1Error("calibration needs a model to sample; name one in [base]")
    base_rates, strong_rates = None, None
    if base is None and config.base is not None:
        base_rates = RateStore(folder / "base_rates.jsonl", config.base, config.num_samples)
        base = _opened(config.base)
    if strong is None and config.strong is not None:
        strong_rates = RateStore(folder / "strong_rates.jsonl", config.strong, config.num_samples)
        strong = _opened(config.strong)
    assert base is not None
    models = (Subject(base, base_rates), Subject(strong, strong_rates) if strong else None)
    with RewardService() as service:
        cells = calibrate(config, *models, service, report=report)
    folder.mkdir(parents=True, exist_ok=True)
    table = useful(cells)
    content = {
        "useful": table,
        "cells": [_row(cell) for cell in cells],
        "settings": config.model_dump(mode="json"),
    }
    atomic_write(folder / "difficulties.json", (json.dumps(content, indent=1) + "\n").encode())
    atomic_write(folder / "tasks.toml", recipe_fragment(table, config.num_rl).encode())
    _draw(folder / "calibration.png", cells)
    return table


def recipe_fragment(table: dict[str, list[int]], num_rl: int) -> str:
    """The useful difficulties as `data.tasks` of a recipe, `num_rl` tasks of each."""
    entries = [
        f'[[data.tasks]]\nname = "{name}-{difficulty}"\ndataset = "logic:{name}"\n'
        f"parameters = {{ difficulty = {difficulty} }}\nnum_rl = {num_rl}\n"
        for name, difficulties in table.items()
        for difficulty in difficulties
    ]
    return "\n".join(entries)


def _opened(config: AnswererConfig) -> Sampler:
    from m1.curate.samplers import open_sampler  # imports torch

    return open_sampler(config)


def _row(cell: Cell) -> dict[str, Any]:
    row: dict[str, Any] = {
        "task": cell.task,
        "difficulty": cell.difficulty,
        "is_useful": cell.reason is None,
        "reason": cell.reason,
        "base": _shown(cell.base),
    }
    if cell.strong is not None:
        row["strong"] = _shown(cell.strong)
    return row


def _shown(found: Measured) -> dict[str, Any]:
    return {
        "pass_rate": found.passes.share,
        "interval_95": _interval(found.passes),
        "pass_at_k": found.pass_at_k,
        "num_judged": found.passes.num_judged,
    }


def _interval(rate: PassRate) -> list[float] | None:
    """Jeffreys interval; too narrow where completions of one puzzle are alike."""
    from scipy.special import betaincinv

    if not rate.num_judged:
        return None
    failures = rate.num_judged - rate.num_passed
    ends = [float(betaincinv(rate.num_passed + 0.5, failures + 0.5, q)) for q in _INTERVAL]
    return [0.0 if rate.num_passed == 0 else ends[0], 1.0 if failures == 0 else ends[1]]


def _draw(path: Path, cells: Sequence[Cell]) -> None:
    import numpy as np
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(cell.task for cell in cells))
    levels = sorted({cell.difficulty for cell in cells})
    values = np.full((len(names), len(levels)), np.nan)
    figure = Figure(
        figsize=(2.5 + 0.5 * len(levels), 1.2 + 0.25 * len(names)), layout="constrained"
    )
    axes = figure.subplots()
    for cell in cells:
        row, column = names.index(cell.task), levels.index(cell.difficulty)
        share = cell.base.passes.share
        values[row, column] = np.nan if share is None else share
        if cell.reason is None:
            axes.plot(column, row, "o", color="white", markeredgecolor="black", markersize=5)
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(levels)), [str(level) for level in levels])
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("difficulty (marked: useful)")
    figure.colorbar(image, ax=axes, label="pass rate of the base model")
    figure.savefig(path, dpi=120)
