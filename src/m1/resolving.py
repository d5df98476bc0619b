"""From a recipe's text and overrides, as a person edits them in KFP's UI, to what each stage gets.

What is compiled into a pipeline (its stages, image, resources and places) cannot be changed there.
"""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from m1.config.loading import parse_recipe, recipe_json
from m1.config.schema import CiConfig, Recipe, ResourcesConfig, TrackingConfig
from m1.config.stages import STAGES, stage_hashes, stage_kind, stages_of
from m1.launch import stage_recipe
from m1.types import M1Error

ONLY = ("data", "rl", "evaluate")
"""Pipelines of a part of the stages."""
_DROPPED: Mapping[str, tuple[str, ...]] = {
    "data": (),
    "rl": ("sft", "evaluate", "register_"),
    "evaluate": ("sft", "rl", "register_"),
}


class Fixed(BaseModel):
    """What a compiled pipeline cannot change any more."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    only: str = ""
    """Part of the pipeline, one of ONLY; empty: all."""
    stages: tuple[str, ...]
    """Its stages."""
    places: dict[str, Any]
    """Image, resources and tracking of the recipe."""


def fixed_parts(recipe: Recipe, only: str = "") -> Fixed:
    """What compiling this recipe fixes."""
    dumped = recipe.model_dump(mode="json", by_alias=True)
    places = {name: dumped[name] for name in ("image", "resources", "tracking")}
    return Fixed(only=only, stages=stages_in(recipe, only), places=places)


def stages_in(recipe: Recipe, only: str = "") -> tuple[str, ...]:
    """Stages of the recipe's pipeline, or of a part of it, in order of execution.

    Raises:
        M1Error: There is no such part, or the recipe lacks what it is about.
    """
    if not only:
        return stages_of(recipe)
    if only not in ONLY:
        raise M1Error(f"there is no pipeline of {only!r} only; there is: {', '.join(ONLY)}")
    if getattr(recipe, only) is None:
        raise M1Error(f"recipe {recipe.name} has no [{only}]; add it, or run another part")
    kinds = {"data", "sandbox"} if only == "data" else {"data", "sandbox", "pretrain", only}
    return tuple(stage for stage in stages_of(recipe) if stage_kind(stage) in kinds)


def resolve(recipe_text: str, overrides: str, *, fixed: Fixed, checkpoint: str = "") -> Recipe:
    """The recipe that a run computes.

    Args:
        recipe_text: TOML, or the JSON of `m1 recipe show`.
        overrides: `dotted.key=value`, one a line.
        fixed: What was compiled.
        checkpoint: Where a part of the pipeline begins; empty: where the recipe does.

    Raises:
        M1Error: With every mistake in it, or what would need another pipeline.
    """
    lines = [line.strip() for line in overrides.splitlines() if line.strip()]
    if checkpoint:
        lines += ["pretrain.num_steps=0", f"pretrain.start={json.dumps(checkpoint)}"]
    elif fixed.only in ("rl", "evaluate"):
        raise M1Error(f"a run of {fixed.only} only starts from a checkpoint, but none is given")
    recipe = parse_recipe(_table(recipe_text), overrides=lines, origin="parameter recipe")
    recipe = recipe.model_copy(update=dict.fromkeys(_DROPPED.get(fixed.only, ())))
    now = fixed_parts(recipe, fixed.only)
    changed = [name for name, value in fixed.places.items() if now.places[name] != value]
    if changed or now.stages != fixed.stages:
        what = ", ".join(changed) or f"the stages ({', '.join(now.stages)})"
        raise M1Error(
            f"the parameters change {what}, but this pipeline was compiled with others (stages "
            f"{', '.join(fixed.stages)}); submit the changed recipe with `m1 submit`"
        )
    return recipe


def resolve_component(
    recipe: str, overrides: str, *, fixed: str, checkpoint: str, summary: Any
) -> tuple[str, ...]:
    """Body of the component `resolve`: the part of the recipe for each kind of stage.

    Stages get neither image, tracking nor resources here, so that KFP's cache is not missed when
    only these change. Of several RL lengths each gets the last one's part and reduces it further.
    """
    parts = Fixed.model_validate_json(fixed)
    resolved = resolve(recipe, overrides, fixed=parts, checkpoint=checkpoint)
    Path(summary.path).parent.mkdir(parents=True, exist_ok=True)
    Path(summary.path).write_text(_markdown(resolved, parts.stages), encoding="utf-8")
    texts = dict.fromkeys(STAGES, "")
    for stage in parts.stages:
        texts[stage_kind(stage)] = stage_json(stage, resolved)
    return tuple(texts.values())


def recipe_line(recipe: Recipe) -> str:
    """What the recipe says beyond defaults, as JSON.

    It is one line, because KFP's compiler copies a parameter's default into a comment.
    """
    return json.dumps(_beyond_defaults(recipe), ensure_ascii=False)


def stage_json(stage: str, recipe: Recipe) -> str:
    """What a stage's component is given: all that its result depends on, and where it is kept."""
    bare = recipe.model_copy(
        update={
            "tracking": TrackingConfig(),
            "resources": ResourcesConfig(),
            "ci": CiConfig(),
            "image": Recipe.model_fields["image"].default,
        }
    )
    return stage_recipe(stage, bare).model_dump_json(by_alias=True)


def places_json(recipe: Recipe) -> str:
    """What comes to a stage beside its parameters (`m1.launch.PLACES_VARIABLE`)."""
    dumped = _beyond_defaults(recipe)
    names = ("tracking", "resources", "image")
    return json.dumps({name: dumped[name] for name in names if name in dumped}, sort_keys=True)


def _beyond_defaults(recipe: Recipe) -> dict[str, Any]:
    """What the recipe says beyond defaults; resources in full, as theirs are the recipe's own."""
    dumped = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    if "resources" in dumped:
        dumped["resources"] = recipe.resources.model_dump(mode="json", by_alias=True)
    return dumped


def _table(text: str) -> dict[str, Any]:
    try:
        if text.lstrip().startswith("{"):
            found: dict[str, Any] = json.loads(text)
            return found
        return tomllib.loads(text)
    except ValueError as error:  # of either parser
        raise M1Error(f"parameter recipe is neither TOML nor JSON: {error}; mend it") from None


def _markdown(recipe: Recipe, stages: tuple[str, ...]) -> str:
    hashes = stage_hashes(recipe)
    lines = [f"# {recipe.name}", "", "| stage | hash |", "|---|---|"]
    lines += [f"| {stage} | `{hashes[stage][:12]}` |" for stage in stages]
    return "\n".join([*lines, "", "```json", recipe_json(recipe), "```", ""])
