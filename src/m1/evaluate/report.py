"""The report of a run: one HTML file that needs no network, with every figure inside."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from m1.evaluate.figures import pearson_r
from m1.evaluate.tables import card_tables
from m1.rollout.traces import StoredRollout, read_step, steps_in
from m1.tracking.graph import draw_stages
from m1.tracking.page import stage_nodes
from m1.tracking.progress import format_duration
from m1.types import Pointer

ROLLOUT_GROUPS = 3
"""Groups of a step to browse."""


def write_report(
    path: Path,
    *,
    summary: Mapping[str, Any],
    card: Mapping[str, Any] | None,
    figures: Mapping[str, str],
    probabilities: Mapping[str, Sequence[float]] | None,
    recipe_json: str,
    pointers: Mapping[str, Pointer],
    rollouts: Sequence[StoredRollout] = (),
) -> None:
    """Write the report; what a run does not have is replaced by a sentence that says so.

    Args:
        path: The HTML file to write.
        summary: The run's summary.json.
        card: The data card: any nested JSON object.
        figures: SVG texts by name, of `m1.evaluate.figures`.
        probabilities: Probabilities of the same tokens in `training` and in `inference` mode.
        recipe_json: The resolved recipe.
        pointers: Output of each finished stage.
        rollouts: Rollouts to browse, of `sample_rollouts`.
    """
    environment = Environment(
        loader=PackageLoader("m1.evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scores = summary.get("scores", {})
    html = environment.get_template("report.html.j2").render(
        summary=summary,
        wall=format_duration(float(summary.get("wall_seconds", 0.0))),
        graph=draw_stages(stage_nodes(summary, pointers)),
        figures=figures,
        correlation=_correlation(probabilities),
        score_rows=_score_rows(scores),
        tables=card_tables(card or {}),
        pointers=pointers,
        recipe=_pretty(recipe_json),
        rollouts=[{"facts": asdict(r), "title": _title(r)} for r in rollouts],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")


def sample_rollouts(folder: Path) -> list[StoredRollout]:
    """Rollouts of the first, a middle and the last step that has a file, right and wrong ones.

    Of each step at most three groups, of each the first right and the first wrong rollout.
    """
    steps = steps_in(folder)
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    found: list[StoredRollout] = []
    for step in chosen:
        rows = [row for row in read_step(folder, step) if not row.is_failed]
        for group in sorted({row.group for row in rows})[:ROLLOUT_GROUPS]:
            own = [row for row in rows if row.group == group]
            right = [row for row in own if row.accuracy == 1][:1]
            found += right + [row for row in own if row.accuracy < 1][:1]
    return found


def _title(rollout: StoredRollout) -> str:
    outcome = "right" if rollout.accuracy == 1 else "wrong"
    return (
        f"step {rollout.step}, {rollout.task_id}, number {rollout.index}: {outcome}, reward "
        f"{rollout.reward:.3g}, {len(rollout.tokens)} tokens, {rollout.finish_reason}"
    )


def _correlation(probabilities: Mapping[str, Sequence[float]] | None) -> str:
    if not probabilities:
        return ""
    return f"{pearson_r(probabilities['training'], probabilities['inference']):.5f}"


def _score_rows(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, str]]:
    return [
        {
            "benchmark": benchmark,
            "model": model,
            "mean": f"{score['mean']:.3f}",
            "interval": f"[{score['low']:.3f}, {score['high']:.3f}]",
            "pass_at_k": _pass_at_k(score),
            "n": str(score.get("n", "")),
        }
        for benchmark, row in scores.items()
        for model, score in row.items()
    ]


def _pass_at_k(score: Mapping[str, Any]) -> str:
    """`pass@4 0.885 [0.835, 0.925]`, or a dash."""
    found = score.get("pass_at_k")
    if found is None:
        return "-"
    return f"pass@{score['k']} {found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _pretty(text: str) -> str:
    return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
