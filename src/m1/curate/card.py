"""What curation leaves on disk: tasks, drops with reasons, a card, a funnel chart."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from m1.curate.run import Curated
from m1.curate.settings import CurateConfig
from m1.data.tasks import write_tasks
from m1.storage import atomic_write


def write_curated(folder: Path, curated: Curated, config: CurateConfig) -> dict[str, Any]:
    """Write tasks.jsonl, dropped.jsonl, card.json, card.md and funnel.png; the card."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tasks(folder / "tasks.jsonl", curated.tasks)
    lines = [
        json.dumps(
            {
                "task_id": d.task.task_id,
                "source": d.task.source,
                "step": d.step,
                "reason": d.reason,
                "because_of": d.because_of,
                "prompt": d.task.prompt,
            }
        )
        for d in curated.dropped
    ]
    atomic_write(folder / "dropped.jsonl", "".join(line + "\n" for line in lines).encode())
    card = make_card(curated, config)
    atomic_write(folder / "card.json", (json.dumps(card, indent=1) + "\n").encode())
    atomic_write(folder / "card.md", _markdown(card).encode())
    _draw(folder / "funnel.png", curated.funnel)
    return card


def make_card(curated: Curated, config: CurateConfig) -> dict[str, Any]:
    """Counts by step, reason, source and verifier, and the settings."""
    reasons = Counter((d.step, d.reason) for d in curated.dropped)
    return {
        "num_kept": len(curated.tasks),
        "num_dropped": len(curated.dropped),
        "num_opened": curated.num_opened,
        "funnel": [{"step": step, "left": left} for step, left in curated.funnel],
        "reasons": [
            {"step": step, "reason": reason, "count": count}
            for (step, reason), count in sorted(reasons.items())
        ],
        "kept_by_source": dict(Counter(task.source for task in curated.tasks)),
        "kept_by_verifier": dict(Counter(task.verifier for task in curated.tasks)),
        "settings": config.model_dump(mode="json"),
    }


def _markdown(card: dict[str, Any]) -> str:
    lines = [
        "# Curated tasks",
        "",
        f"{card['num_kept']} kept, {card['num_dropped']} dropped, {card['num_opened']} "
        "multiple-choice questions made open.",
        "",
        "| step | left |",
        "|---|---|",
        *(f"| {row['step']} | {row['left']} |" for row in card["funnel"]),
        "",
        "| step | reason | dropped |",
        "|---|---|---|",
        *(f"| {r['step']} | {r['reason']} | {r['count']} |" for r in card["reasons"]),
        "",
        "| source | kept |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in sorted(card["kept_by_source"].items())),
    ]
    return "\n".join(lines) + "\n"


def _draw(path: Path, funnel: list[tuple[str, int]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.4 * len(funnel) + 1), layout="constrained")
    axes = figure.subplots()
    names = [name for name, _ in reversed(funnel)]
    counts = [count for _, count in reversed(funnel)]
    bars = axes.barh(names, counts, color="#4878a8")
    axes.bar_label(bars, padding=3)
    axes.set_xlabel("tasks left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
