"""The DAG: data -> pretrain -> sft -> rl -> evaluate -> register, as far as the recipe has them.

Beside data, `sandbox` builds environments for rl and evaluate. Before all, `resolve` applies what a
person changed in the UI. A part of it is a pipeline too: data only, or rl or evaluate only, from a
checkpoint.
"""

import contextlib
from collections.abc import Callable
from typing import Any

from kfp import dsl

from components.data import data
from components.evaluate import evaluate
from components.pretrain import pretrain
from components.register import register
from components.resolve import resolve
from components.rl import rl
from components.sandbox import sandbox
from components.sft import sft
from components.teardown import teardown
from m1.config.schema import Recipe
from m1.config.stages import rl_config, stage_kind
from m1.resolving import fixed_parts, recipe_line
from pipelines.cluster import equip, fixed_json, pipeline_config

TITLES = {
    "data": "Data",
    "sandbox": "Environments",
    "pretrain": "Continual pretraining",
    "sft": "SFT",
    "rl": "RL (CISPO)",
    "evaluate": "Evaluation",
    "register": "Registration",
}
COMPONENTS = {
    "data": data,
    "sandbox": sandbox,
    "pretrain": pretrain,
    "sft": sft,
    "rl": rl,
    "evaluate": evaluate,
    "register": register,
}


def build_pipeline(recipe: Recipe, only: str = "") -> Callable[..., Any]:
    """The KFP pipeline of a recipe, or of a part of it.

    Stages are chosen here, while the DAG is built, so that it is flat: what the recipe leaves out
    is not in it. Each task gets the part of the recipe that it depends on and the pointers of
    earlier stages. RL in several lengths is a chain of tasks, each with its own checkpoint. Runs
    that make objects in a cluster have an exit handler, which deletes them.

    Args:
        recipe: The recipe.
        only: `data`, `rl` or `evaluate`; the latter two start at the parameter `checkpoint`.
    """
    fixed = fixed_parts(recipe, only)
    text = recipe_line(recipe)
    name = f"m1-{recipe.name}-{only}" if only else f"m1-{recipe.name}"
    decorate = dsl.pipeline(
        name=name.replace("_", "-"),
        description="MiniMax-M1 training",
        pipeline_config=pipeline_config(recipe.resources),
    )

    def whole(
        recipe: str = text, overrides: str = "", run_name: str = "", priority: str = ""
    ) -> None:
        stages.add(recipe, overrides, "", {"run_name": run_name, "priority": priority})

    def part(
        checkpoint: str,
        recipe: str = text,
        overrides: str = "",
        run_name: str = "",
        priority: str = "",
    ) -> None:
        stages.add(recipe, overrides, checkpoint, {"run_name": run_name, "priority": priority})

    stages = _Stages(recipe, fixed.stages, fixed_json(fixed))
    return decorate(part if only in ("rl", "evaluate") else whole)  # type: ignore[no-any-return]


class _Stages:
    """Adds the tasks of a pipeline while KFP calls its function."""

    def __init__(self, recipe: Recipe, names: tuple[str, ...], fixed: str) -> None:
        self._recipe, self._names, self._fixed = recipe, names, fixed

    def add(self, recipe: Any, overrides: Any, checkpoint: Any, labels: dict[str, Any]) -> None:
        """Add all tasks; arguments are KFP's parameters."""
        kinds = [stage_kind(name) for name in self._names]
        guard: Any = contextlib.nullcontext()
        if any(self._recipe.resources.makes_objects(kind) for kind in kinds):
            clean = teardown(run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER)
            guard = dsl.ExitHandler(
                equip(clean, "default", self._recipe).set_display_name("Teardown")
            )
        with guard:
            parts = resolve(
                recipe=recipe, overrides=overrides, fixed=self._fixed, checkpoint=checkpoint
            )
            equip(parts, "default", self._recipe).set_display_name("Recipe")
            self._add_stages(parts, labels)

    def _add_stages(self, parts: Any, labels: dict[str, Any]) -> None:
        made: dict[str, Any] = {}
        for name in self._names:
            kind = stage_kind(name)
            component = COMPONENTS[kind]
            inputs = {"recipe": parts.outputs[kind]}
            accepted = component.component_spec.inputs
            inputs |= {k: v for k, v in made.items() if k in accepted and k != kind}
            if kind == "rl":
                inputs["stage"] = name
                if "rl" in made:
                    inputs["previous"] = made["rl"]
            if self._recipe.resources.makes_objects(kind):
                inputs |= {"run_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER, **labels}
            task = equip(component(**inputs), kind, self._recipe)
            made[kind] = task.set_display_name(self._title(name)).outputs["output"]

    def _title(self, name: str) -> str:
        title = TITLES[stage_kind(name)]
        if name == stage_kind(name):
            return title
        return f"{title}, {rl_config(name, self._recipe).sampling.max_new_tokens:,} tokens"
