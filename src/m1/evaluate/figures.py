"""Figures of a run as SVG texts, ready to stand inside HTML or to be logged as files.

Each function returns None where the run has nothing to show.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from m1.config.stages import in_order, stage_kind

MetricRows = Sequence[Mapping[str, Any]]
"""Lines of a stage's metrics.jsonl: `{"step": 3, "metrics": {"pretrain/loss": 5.1}}`."""

COLOURS = {"pretrain": "#7a869a", "sft": "#d98f2b", "rl": "#2f6db3"}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999",
    "axes.labelcolor": "#444",
    "axes.titlesize": 9.5,
    "axes.grid": True,
    "grid.color": "#ececea",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#666",
    "ytick.color": "#666",
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_RL_PANELS = {
    "rl/reward": "mean reward",
    "rl/accuracy": "accuracy (share correct)",
    "rl/completion_length_tokens": "completion length (tokens)",
    "rl/entropy_nats": "policy entropy (nats)",
    "rl/clip_fraction": "share of clipped tokens",
    "rl/probability_correlation": "Pearson r, trainer against sampler",
}
_SMOOTH_FROM_POINTS = 30


@dataclass(frozen=True)
class Series:
    """One metric against optimizer steps."""

    steps: list[int]
    values: list[float]


def read_series(rows: MetricRows, name: str) -> Series:
    """Finite values of a metric by step; of a step that was repeated after a resume, the last."""
    by_step: dict[int, float] = {}
    for row in rows:
        value = row.get("metrics", {}).get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            by_step[int(row["step"])] = float(value)
    steps = sorted(by_step)
    return Series(steps, [by_step[step] for step in steps])


def render_figures(
    metrics: Mapping[str, MetricRows],
    scores: Mapping[str, Mapping[str, Mapping[str, float]]],
    probabilities: Mapping[str, Sequence[float]] | None,
) -> dict[str, str]:
    """Every figure that the run can fill: `scores`, `rl`, `probabilities`, `losses`."""
    found = probabilities or {}
    figures = {
        "scores": render_scores_figure(scores),
        "rl": render_rl_figure(metrics.get("rl", ())),
        "probabilities": render_probability_figure(
            found.get("training", ()), found.get("inference", ())
        ),
        "losses": render_loss_figure(metrics),
    }
    return {name: svg for name, svg in figures.items() if svg is not None}


def joined_stages(metrics: Mapping[str, MetricRows]) -> dict[str, MetricRows]:
    """Metrics by kind of stage: those of RL's length stages one after the other as `rl`."""
    joined: dict[str, list[Mapping[str, Any]]] = {}
    for stage in in_order(metrics):
        rows = joined.setdefault(stage_kind(stage), [])
        done = max((int(row["step"]) for row in rows), default=0)
        rows += [{**row, "step": int(row["step"]) + done} for row in metrics[stage]]
    return dict(joined)


def render_loss_figure(metrics: Mapping[str, MetricRows]) -> str | None:
    """Training and held-out loss of pretraining and SFT, one panel a stage."""
    panels = []
    for stage in ("pretrain", "sft"):
        rows = metrics.get(stage, ())
        train = read_series(rows, f"{stage}/loss")
        heldout = read_series(rows, f"{stage}/heldout_loss")
        if train.steps or heldout.steps:
            panels.append((stage, train, heldout))
    if not panels:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (stage, train, heldout) in zip(axes, panels, strict=True):
            if train.steps:
                axis.plot(train.steps, train.values, color=COLOURS[stage], label="training")
            if heldout.steps:
                style = {"color": "#b3403a", "marker": "o", "markersize": 3}
                axis.plot(heldout.steps, heldout.values, label="held-out", **style)
            axis.set(title=stage, xlabel="optimizer step", ylabel="loss (nats per token)")
            axis.legend()

    return _render(draw, width=4.4 * len(panels), height=2.9, salt="loss")


def render_rl_figure(rows: MetricRows) -> str | None:
    """Reward, accuracy, length, entropy, clipping and probability correlation against RL steps."""
    series = {name: read_series(rows, name) for name in _RL_PANELS}
    present = {name: found for name, found in series.items() if found.steps}
    if not present:
        return None
    num_columns = min(3, len(present))
    num_rows = -(-len(present) // num_columns)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
        for axis in axes[len(present) :]:
            axis.set_axis_off()
        for axis, (name, found) in zip(axes, present.items(), strict=False):
            _plot_smoothed(axis, found, COLOURS["rl"])
            axis.set(title=_RL_PANELS[name], xlabel="RL step")
            if name == "rl/probability_correlation":  # its distance from 1 is what matters
                axis.ticklabel_format(axis="y", useOffset=False)
                axis.set_ylim(min(0.999, *found.values), 1.0001)

    return _render(draw, width=3.1 * num_columns, height=2.4 * num_rows, salt="rl")


def render_probability_figure(training: Sequence[float], inference: Sequence[float]) -> str | None:
    """Scatter of the trainer's against the sampler's token probabilities (paper Fig. 3)."""
    if not training or len(training) != len(inference):
        return None
    r = pearson_r(training, inference)

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        axis.plot([0, 1], [0, 1], color="#bbb", lw=1, zorder=1)
        # Points become one image: ten thousand SVG circles would make the page slow.
        axis.scatter(inference, training, s=5, alpha=0.35, lw=0, color="#2f6db3", rasterized=True)
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axis.set(xlabel="probability in inference mode", ylabel="probability in training mode")
        axis.set_title(f"Pearson r = {r:.5f}, {len(training):,} tokens")

    return _render(draw, width=4.2, height=4.0, salt="probabilities")


def render_scores_figure(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str | None:
    """Mean score of each stage's model per benchmark, with its interval."""
    if not scores:
        return None
    models = list(dict.fromkeys(model for row in scores.values() for model in row))
    width = 0.8 / len(models)

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for index, model in enumerate(models):
            for place, row in enumerate(scores.values()):
                if model in row:
                    _bar(axis, place + (index - (len(models) - 1) / 2) * width, width, model, row)
        axis.set_xticks(range(len(scores)), list(scores))
        axis.set(ylabel="mean score", ylim=(0, None))
        axis.grid(axis="x", visible=False)
        handles = [Patch(color=_colour(model), label=model) for model in models]
        axis.legend(handles=handles, ncols=len(models), loc="lower left", bbox_to_anchor=(0, 1))

    return _render(draw, width=max(4.2, 1.9 * len(scores) + 1.2), height=3.0, salt="scores")


def pearson_r(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's correlation; NaN where either side is constant."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(a) < 2 or not a.std() or not b.std():
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def _bar(
    axis: Axes, x: float, width: float, model: str, row: Mapping[str, Mapping[str, float]]
) -> None:
    score = row[model]
    mean = score["mean"]
    spread = [[max(0.0, mean - score["low"])], [max(0.0, score["high"] - mean)]]
    axis.bar(x, mean, width * 0.92, color=_colour(model))
    axis.errorbar(x, mean, yerr=spread, color="#333", lw=1, capsize=2.5)


def _colour(model: str) -> str:
    return COLOURS.get(stage_kind(model), "#999")


def _plot_smoothed(axis: Axes, series: Series, colour: str) -> None:
    """The values; from 30 points on pale, under their running mean over a tenth of the points."""
    if len(series.steps) < _SMOOTH_FROM_POINTS:
        axis.plot(series.steps, series.values, "o-", ms=2.5, color=colour)
        return
    window = max(3, len(series.steps) // 10)
    sums = np.cumsum([0.0, *series.values])
    ends = np.arange(1, len(series.steps) + 1)
    starts = np.maximum(0, ends - window)
    axis.plot(series.steps, series.values, color=colour, alpha=0.3, lw=0.9)
    axis.plot(series.steps, (sums[ends] - sums[starts]) / (ends - starts), color=colour)


def _render(draw: Callable[[Figure], None], *, width: float, height: float, salt: str) -> str:
    """Draw in the common style; equal input gives equal bytes, and ids differ between figures."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"m1-{salt}"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", dpi=160, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    # Several figures share a page: drop the page-wide style, and group ids that all figures share.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    return re.sub(r'<g id="[^"]*"', "<g", text)
