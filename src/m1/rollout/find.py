"""Where a run's rollouts lie on this machine."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m1.config.schema import Recipe
from m1.config.stages import in_order, stage_hashes, stage_kind
from m1.rollout.traces import steps_in
from m1.stage import ROLLOUTS, pointer_key
from m1.types import M1Error


def rollout_folders(run: Path) -> dict[str, Path]:
    """Folders with rollouts by RL stage, in order, of a run's folder or a stage's.

    Raises:
        M1Error: There are none.
    """
    if steps_in(run / ROLLOUTS):
        return {run.name.partition("-")[0]: run / ROLLOUTS}
    if not run.is_dir():
        raise M1Error(f"{run} is no folder; give a run's, such as runs/latest, or an RL stage's")
    root = run.resolve().parent
    hashes = _hashes(run)
    found = {
        stage: root / Path(pointer_key(stage, hashes[stage])).parent / ROLLOUTS
        for stage in in_order(hashes)
        if stage_kind(stage) == "rl"
    }
    kept = {stage: folder for stage, folder in found.items() if steps_in(folder)}
    if not kept:
        looked = ", ".join(map(str, found.values())) or "no RL stage"
        raise M1Error(
            f"{run} has no rollouts (looked in {looked}); the RL stage has not made a step on this "
            "machine, or rl.traces.every_steps is 0"
        )
    return kept


def _hashes(run: Path) -> Mapping[str, str]:
    """Stage hashes of a run: those it wrote, or while it is under way those of its recipe."""
    summary, recipe = run / "summary.json", run / "recipe.json"
    if summary.exists():
        stages: dict[str, dict[str, Any]] = json.loads(summary.read_text())["stages"]
        return {name: str(stage["hash"]) for name, stage in stages.items()}
    if recipe.exists():
        return stage_hashes(Recipe.model_validate_json(recipe.read_text()))
    return {}
