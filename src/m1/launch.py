"""From a stage's name to the code that runs it; what components and the command line call."""

import importlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from m1 import ranks
from m1.config.schema import Recipe
from m1.config.stages import parents_of, rl_config, stage_kind, stages_of
from m1.stage import StageBody, StageContext, StageOutput, execute, finished
from m1.types import M1Error, Pointer

BODIES = {
    "data": "m1.data.stage:data",
    "sandbox": "m1.swe.stage:sandbox",
    "pretrain": "m1.train.supervised:pretrain",
    "sft": "m1.train.supervised:sft",
    "rl": "m1.train.rl:rl",
    "evaluate": "m1.evaluate.runner:evaluate",
    "register": "m1.evaluate.register:register",
}
"""Import path of every stage's body, imported only when the stage runs: a finished stage costs no
torch."""


def run_stage(name: str, recipe: Recipe, *, inputs: Mapping[str, Pointer] | None = None) -> Pointer:
    """Run one stage of a recipe, or find it done.

    A stage whose layout has several processes gets them on this machine, by torchrun.

    Raises:
        M1Error: The recipe has no such stage, or the stage could not run.
    """
    if name not in stages_of(recipe):
        raise M1Error(
            f"recipe {recipe.name} has no stage {name!r}; it has: {', '.join(stages_of(recipe))}"
        )
    if num_processes(name, recipe) > 1 and finished(name, recipe) is None:
        return ranks.run(name, recipe, inputs=inputs, num_processes=num_processes(name, recipe))
    return execute(name, recipe, partial(run_body, name), inputs=inputs)


def num_processes(name: str, recipe: Recipe) -> int:
    """Processes of a stage's parallel layout; 1 for stages without one."""
    parallel = getattr(getattr(recipe, stage_kind(name), None), "parallel", None)
    return parallel.world_size if parallel is not None else 1


def run_body(name: str, context: StageContext, recipe: Recipe) -> StageOutput:
    """Import a stage's body and run it."""
    module, _, function = BODIES[stage_kind(name)].partition(":")
    warnings.filterwarnings("ignore", module="megatron")  # what it lacks, m1 doctor says
    if name not in ("data", "sandbox"):  # these do without torch
        importlib.import_module("m1.model.cpu").without_compilation()
    body: StageBody = getattr(importlib.import_module(module), function)
    return body(context, recipe)


def stage_recipe(name: str, recipe: Recipe) -> Recipe:
    """The recipe reduced to one stage and those it depends on.

    Its stage hashes equal the whole recipe's, so a component that gets it is not run again, nor its
    cached result in KFP discarded, when a later stage's table changes.
    """
    needed = _ancestors(name, recipe)
    kinds = {stage_kind(stage) for stage in needed}
    dropped = [s for s in ("sft", "rl", "evaluate", "register") if s not in kinds]
    fields = {"register": "register_"}
    changes: dict[str, Any] = {fields.get(stage, stage): None for stage in dropped}
    if recipe.rl is not None and "rl" in kinds and recipe.rl.lengths:
        kept = [rl_config(s, recipe).lengths[0] for s in needed if stage_kind(s) == "rl"]
        changes["rl"] = recipe.rl.model_copy(update={"lengths": tuple(kept)})
    return recipe.model_copy(update=changes)


def _ancestors(name: str, recipe: Recipe) -> list[str]:
    """A stage and all that its hash depends on, in order of execution."""
    needed, waiting = {name}, [name]
    while waiting:
        new = set(parents_of(waiting.pop(), recipe)) - needed
        needed |= new
        waiting += new
    return [stage for stage in stages_of(recipe) if stage in needed]


def run_component(name: str, recipe_json: str, *, inputs: Mapping[str, Any], output: Any) -> None:
    """Body of a KFP component: pointers of earlier stages in, this stage's pointer out.

    Args:
        name: The stage.
        recipe_json: The resolved recipe as JSON.
        inputs: KFP input artifacts by the kind of stage; None for stages that the recipe leaves
            out. One of kind `rl` is the last length stage before this one.
        output: KFP output artifact; its file becomes the pointer, its metadata name the uri.
    """
    recipe = Recipe.model_validate_json(recipe_json)
    given = (
        Pointer(**json.loads(Path(artifact.path).read_text()))
        for artifact in inputs.values()
        if artifact is not None
    )
    pointers = {pointer.stage: pointer for pointer in given}
    # Of several length stages the DAG passes the last, which ran after the others.
    for parent in parents_of(name, recipe):
        found = None if parent in pointers else finished(parent, recipe)
        if found is not None:
            pointers[parent] = found
    pointer = run_stage(name, recipe, inputs=pointers)
    Path(output.path).parent.mkdir(parents=True, exist_ok=True)
    Path(output.path).write_text(json.dumps(asdict(pointer)))
    output.metadata["uri"] = pointer.uri
    output.metadata["digest"] = pointer.digest
    output.metadata["stage_hash"] = pointer.stage_hash


def finished_stages(recipe: Recipe) -> dict[str, Pointer]:
    """Pointers of the recipe's stages that are done, in order."""
    found = {stage: finished(stage, recipe) for stage in stages_of(recipe)}
    return {stage: pointer for stage, pointer in found.items() if pointer is not None}


def project_root() -> Path:
    """Folder with `pipelines/`: M1_PROJECT, or the nearest above the current folder or this file.

    Raises:
        M1Error: There is none; the wheel alone holds no pipeline definitions.
    """
    given = os.environ.get("M1_PROJECT")
    starts = [Path(given)] if given else [Path.cwd(), Path(__file__).resolve()]
    for start in starts:
        for folder in (start, *start.parents):
            if (folder / "pipelines" / "m1.py").is_file():
                return folder
    raise M1Error(
        "no pipelines/m1.py in this folder or above it; run m1 inside a checkout of the project, "
        "or set M1_PROJECT to one"
    )
