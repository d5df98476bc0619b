"""The paper's Fig. 1 right as SVG: FLOPs against generation length, one panel a convention."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from m1.config.model_tables import ModelConfig
from m1.plan.inference import (
    CONVENTIONS,
    DEEPSEEK_R1,
    QWEN3_235B,
    Convention,
    architecture_of,
    generation_flops,
)

_MAX_TOKENS = 128_000
_NUM_POINTS = 65
_COLOURS = ("#2f6db3", "#7a869a", "#d98f2b")
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "m1-plan",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#ececea",
    "legend.frameon": False,
}


def draw_generation(model: ModelConfig, name: str, path: Path) -> None:
    """Write the figure; equal input gives equal bytes."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 3.2), layout="constrained")
        panels = figure.subplots(1, len(CONVENTIONS), sharey=True)
        for axis, convention in zip(panels, CONVENTIONS, strict=True):
            _draw_panel(axis, model, name, convention)
        panels[0].set_ylabel("FLOPs to generate n tokens (1e15)")
        panels[0].legend()
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _draw_panel(axis: Any, model: ModelConfig, name: str, convention: Convention) -> None:
    lengths = [round(_MAX_TOKENS * i / (_NUM_POINTS - 1)) for i in range(_NUM_POINTS)]
    models = (architecture_of(model, name), DEEPSEEK_R1, QWEN3_235B)
    for architecture, colour in zip(models, _COLOURS, strict=True):
        flops = [generation_flops(architecture, n, convention) for n in lengths]
        axis.plot(
            _scaled(lengths, 1e3), _scaled(flops, 1e15), color=colour, label=architecture.name
        )
    axis.set(title=CONVENTIONS[convention], xlabel="n (thousand tokens)", xlim=(0, None))
    axis.set_ylim(0, None)


def _scaled(values: Iterable[float], unit: float) -> list[float]:
    return [value / unit for value in values]
