"""From a stage's name to the code that runs it; what components and the command line call."""

import contextlib
import importlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from m1.config.resource_tables import WITH_SANDBOXES
from m1.config.schema import Recipe, ResourcesConfig, TrackingConfig
from m1.config.stages import parents_of, rl_config, stage_hashes, stage_kind, stages_of
from m1.launcher.cluster import Cluster, is_inside
from m1.launcher.job import Launcher, RunLabels, StageJob
from m1.launcher.torchrun import TorchrunLauncher
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


def run_stage(
    name: str,
    recipe: Recipe,
    *,
    inputs: Mapping[str, Pointer] | None = None,
    launcher: Launcher | None = None,
) -> Pointer:
    """Run one stage of a recipe, or find it done.

    Args:
        name: The stage.
        recipe: The recipe.
        inputs: Pointers of earlier stages; absent: found by their hashes.
        launcher: Starts the stage's processes; absent: torchrun on this machine, where the stage's
            layout has several.

    Raises:
        M1Error: The recipe has no such stage, or the stage could not run.
    """
    if name not in stages_of(recipe):
        raise M1Error(
            f"recipe {recipe.name} has no stage {name!r}; it has: {', '.join(stages_of(recipe))}"
        )
    processes = num_processes(name, recipe)
    if (processes > 1 or launcher is not None) and finished(name, recipe) is None:
        starts = launcher or TorchrunLauncher()
        return starts.run(StageJob(name, recipe, inputs, processes))
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


@dataclass(frozen=True)
class StageArtifacts:
    """Output artifacts of a component, which KFP's UI shows."""

    metrics: Any
    """`Metrics`: the stage's last numbers."""
    report: Any
    """`HTML`: its curves and tables."""
    summary: Any
    """`Markdown`: what came of it, in a few lines."""


def run_component(
    name: str,
    recipe_json: str,
    *,
    inputs: Mapping[str, Any],
    output: Any,
    artifacts: StageArtifacts,
    run: RunLabels | None = None,
) -> None:
    """Body of a KFP component: pointers of earlier stages in, this stage's pointer out.

    Args:
        name: The stage.
        recipe_json: The resolved recipe as JSON, as `m1.resolving` hands it on.
        inputs: KFP input artifacts by the kind of stage; None for stages that the recipe leaves
            out. One of kind `rl` is the last length stage before this one.
        output: KFP output artifact; its file becomes the pointer, its metadata name the uri.
        artifacts: What else the UI shows.
        run: The run it belongs to; given where the stage makes objects in a cluster.

    Raises:
        M1Error: The stage could not run, or was given the result of another recipe.
    """
    recipe = stage_recipe(name, with_places(Recipe.model_validate_json(recipe_json)))
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
    _refuse_strangers(recipe, pointers)
    pointer = _run_in_place(name, recipe, pointers, run or RunLabels())
    Path(output.path).parent.mkdir(parents=True, exist_ok=True)
    Path(output.path).write_text(json.dumps(asdict(pointer)))
    output.metadata["uri"] = pointer.uri
    output.metadata["digest"] = pointer.digest
    output.metadata["stage_hash"] = pointer.stage_hash
    _show(recipe, pointer, artifacts)


PLACES_VARIABLE = "M1_PLACES"
"""Tables of the recipe that KFP's cache key must not cover, as JSON, set when it is compiled."""


def with_places(recipe: Recipe) -> Recipe:
    """The recipe with the tables that came by the environment, beside the parameters."""
    given = os.environ.get(PLACES_VARIABLE)
    if given is None:
        return recipe
    places = json.loads(given)
    changes: dict[str, Any] = {}
    for name, table in (("tracking", TrackingConfig), ("resources", ResourcesConfig)):
        if name in places:
            changes[name] = table.model_validate(places[name])
    if "image" in places:
        changes["image"] = places["image"]
    return recipe.model_copy(update=changes)


def tear_down_run(run_id: str) -> None:
    """Body of the component `teardown`: delete what a run made in the cluster."""
    if not is_inside():
        return  # a run on one machine made nothing there
    from m1.launcher.teardown import tear_down

    given = json.loads(os.environ.get(PLACES_VARIABLE, "{}"))
    resources = ResourcesConfig.model_validate(given.get("resources", {}))
    for deleted in tear_down(Cluster(resources.trainer.namespace), run_id):
        print(f"deleted {deleted}")


def _run_in_place(
    name: str, recipe: Recipe, inputs: Mapping[str, Pointer], run: RunLabels
) -> Pointer:
    """Run a stage here, or where its resources say if this is a pod of a cluster."""
    resources, kind = recipe.resources, stage_kind(name)
    if not is_inside() or finished(name, recipe) is not None:
        return run_stage(name, recipe, inputs=inputs)
    from m1.launcher.rollout import check_sandboxes, surroundings
    from m1.launcher.trainjob import TrainJobLauncher, cancelled_by_signals
    from m1.rollout.discovery import SERVERS_VARIABLE

    if kind in WITH_SANDBOXES and resources.sandboxes is not None:
        check_sandboxes(resources.sandboxes)
        print(f"sandboxes open in namespace {resources.sandboxes.namespace}")
    if not resources.makes_objects(kind):
        return run_stage(name, recipe, inputs=inputs)
    cluster = Cluster(resources.trainer.namespace)
    launcher = None
    if resources.launcher(kind) == "trainjob":
        launcher = TrainJobLauncher(cluster, run=run)
    with contextlib.ExitStack() as stack:
        stack.enter_context(cancelled_by_signals())
        if kind == "rl":
            servers = stack.enter_context(surroundings(name, recipe, cluster, run=run))
            if servers is not None:
                os.environ[SERVERS_VARIABLE] = servers
        return run_stage(name, recipe, inputs=inputs, launcher=launcher)


def _refuse_strangers(recipe: Recipe, pointers: Mapping[str, Pointer]) -> None:
    """Refuse results that KFP's cache handed on although they belong to another recipe."""
    hashes = stage_hashes(recipe)
    for stage, pointer in pointers.items():
        if hashes.get(stage, pointer.stage_hash) != pointer.stage_hash:
            raise M1Error(
                f"the result of stage {stage} has hash {pointer.stage_hash[:12]}, but this "
                f"recipe's is {hashes[stage][:12]}: KFP handed on a cached one; remove or change "
                f"resources.{stage_kind(stage)}.cache_key"
            )


def _show(recipe: Recipe, pointer: Pointer, artifacts: StageArtifacts) -> None:
    """Write what the UI shows of a finished stage."""
    from m1.evaluate.stage_page import show_stage

    page = show_stage(recipe, pointer)
    for name, value in page.metrics.items():
        artifacts.metrics.log_metric(name, value)
    for artifact, text in ((artifacts.report, page.html), (artifacts.summary, page.markdown)):
        Path(artifact.path).parent.mkdir(parents=True, exist_ok=True)
        Path(artifact.path).write_text(text, encoding="utf-8")


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
