"""What a workflow's UI shows of one stage: numbers, a page with curves and tables, a summary."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from m1.config.schema import Recipe
from m1.evaluate.tables import CardTable, card_tables, format_value
from m1.stage import METRICS, PROBABILITIES, local_root, pointer_key, read_metrics
from m1.storage import open_storage
from m1.tracking.progress import format_duration
from m1.types import Pointer


@dataclass(frozen=True)
class StagePage:
    """What is shown of a stage."""

    metrics: Mapping[str, float]
    """Last value of each metric, and scores by benchmark and model."""
    html: str
    """A page that needs no network."""
    markdown: str
    """A few lines."""


def show_stage(recipe: Recipe, pointer: Pointer) -> StagePage:
    """The page of a finished stage, from its pointer and the metrics beside its output."""
    rows = _rows(recipe, pointer)
    metrics = _last_values(rows) | _scores(pointer)
    figures = _figures(recipe, pointer, rows)
    facts = _facts(pointer)
    tables = card_tables(pointer.metadata.get("card", {}))
    return StagePage(
        metrics=metrics,
        html=_page(pointer, facts, metrics, figures, tables),
        markdown=_markdown(pointer, facts, metrics),
    )


def _rows(recipe: Recipe, pointer: Pointer) -> list[dict[str, object]]:
    """Lines of metrics.jsonl, from this machine or, of a stage that ran elsewhere, the storage."""
    key = str(Path(pointer_key(pointer.stage, pointer.stage_hash)).parent / METRICS)
    local = local_root(recipe) / key
    if local.exists():
        return read_metrics(local)
    storage = open_storage(recipe.storage.root)
    if not storage.exists(key):
        return []
    return [json.loads(line) for line in storage.read_bytes(key).decode().splitlines()]


def _last_values(rows: list[dict[str, object]]) -> dict[str, float]:
    last: dict[str, float] = {}
    for row in rows:
        values = row["metrics"]
        if isinstance(values, Mapping):
            # KFP's record of metrics takes finite numbers only.
            numbers = {n: v for n, v in values.items() if isinstance(v, int | float)}
            last.update({n: float(v) for n, v in numbers.items() if math.isfinite(v)})
    return last


def _scores(pointer: Pointer) -> dict[str, float]:
    scores = pointer.metadata.get("scores", {})
    return {
        f"evaluate/{benchmark}/{model}": float(score["mean"])
        for benchmark, models in scores.items()
        for model, score in models.items()
    }


def _figures(recipe: Recipe, pointer: Pointer, rows: list[dict[str, object]]) -> dict[str, str]:
    scores = pointer.metadata.get("scores", {})
    if not rows and not scores:
        return {}  # without importing matplotlib
    from m1.evaluate.figures import joined_stages, render_figures

    folder = local_root(recipe) / Path(pointer_key(pointer.stage, pointer.stage_hash)).parent
    path = folder / PROBABILITIES
    probabilities = json.loads(path.read_text()) if path.exists() else None
    return render_figures(joined_stages({pointer.stage: rows}), scores, probabilities)


def _facts(pointer: Pointer) -> dict[str, str]:
    facts = {
        "stage": pointer.stage,
        "hash": pointer.stage_hash[:12],
        "took": format_duration(float(pointer.metadata.get("seconds", 0.0))),
        "output": pointer.uri,
        "digest": pointer.digest[:12],
    }
    if pointer.step is not None:
        facts["step"] = f"{pointer.step:,}"
    for name in ("model_id", "model_name", "version", "alias", "mlflow_run_id"):
        if name in pointer.metadata:
            facts[name.replace("_", " ")] = str(pointer.metadata[name])
    return facts


def _page(
    pointer: Pointer,
    facts: Mapping[str, str],
    metrics: Mapping[str, float],
    figures: Mapping[str, str],
    tables: list[CardTable],
) -> str:
    values = tuple((name, format_value(value)) for name, value in metrics.items())
    shown = [CardTable("facts", (), tuple(facts.items()))]
    shown += [CardTable("last values", (), values)] if values else []
    environment = Environment(
        loader=PackageLoader("m1.evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("stage.html.j2").render(
        stage=pointer.stage, figures=figures.values(), tables=[*shown, *tables]
    )


def _markdown(pointer: Pointer, facts: Mapping[str, str], metrics: Mapping[str, float]) -> str:
    lines = [f"# {pointer.stage}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | `{value}` |" for name, value in facts.items()]
    if metrics:
        lines += ["", "| metric | last value |", "|---|---:|"]
        lines += [f"| {name} | {format_value(value)} |" for name, value in metrics.items()]
    return "\n".join(lines) + "\n"
