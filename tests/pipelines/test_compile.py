"""The compiled pipeline: byte-equal, strictly valid, and runnable from its YAML."""

import json
from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from m1.config.loading import load_recipe
from m1.config.schema import Recipe
from m1.config.stages import stage_hashes, stages_of
from m1.launch import finished_stages, stage_recipe
from m1.pipeline import load_pipelines

ROOT = Path(__file__).parents[2]
RECIPES = [
    "pipelines/recipes/laptop.toml",
    "pipelines/recipes/m1_456b.toml",
    "tests/recipes/mini.toml",
    "pipelines/recipes/one_gpu.toml",
    "pipelines/recipes/one_gpu_small.toml",
]


def compiled(recipe: Recipe, path: Path) -> dict:
    load_pipelines("compile").compile_pipeline(recipe, path)
    return document_in(path)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """The compiled file of a recipe by name, made at the first question."""
    folder, made = tmp_path_factory.mktemp("compiled"), {}

    def path_of(name: str) -> Path:
        if name not in made:
            made[name] = folder / f"{len(made)}.yaml"
            compiled(load_recipe([ROOT / name]), made[name])
        return made[name]

    return path_of


def document_in(path: Path) -> dict:
    return next(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("name", RECIPES)
def test_recompilation_gives_the_same_bytes(name, compiled_once, tmp_path):
    compiled(load_recipe([ROOT / name]), tmp_path / "b.yaml")
    assert compiled_once(name).read_bytes() == (tmp_path / "b.yaml").read_bytes()


@pytest.mark.parametrize("name", RECIPES)
def test_the_specification_parses_strictly_and_every_reference_resolves(name, compiled_once):
    recipe = load_recipe([ROOT / name])
    document = document_in(compiled_once(name))
    spec = json_format.ParseDict(document, pipeline_spec_pb2.PipelineSpec())
    executors = json_format.MessageToDict(spec.deployment_spec)["executors"]
    for executor in executors.values():
        json_format.ParseDict(executor, pipeline_spec_pb2.PipelineDeploymentConfig.ExecutorSpec())
        assert executor["container"]["image"] == recipe.image
    tasks = _dag(spec).tasks
    names = {_stage_of(name, task) for name, task in tasks.items()}
    assert names == {"resolve", *stages_of(recipe)}
    for task in tasks.values():
        component = spec.components[task.component_ref.name]
        assert component.executor_label in executors
        assert set(task.dependent_tasks) <= set(tasks)


def _dag(spec):
    """The stages' DAG: the whole, or what an exit handler guards."""
    guarded = [c.dag for n, c in spec.components.items() if n.startswith("comp-exit-handler")]
    return guarded[0] if guarded else spec.root.dag


def _stage_of(name: str, task) -> str:
    """The stage of a task: KFP numbers tasks of one component, which then say theirs themselves."""
    stage = task.inputs.parameters["stage"].runtime_value.constant.string_value
    return stage or name


def test_lengths_are_a_chain_of_tasks_that_ends_in_evaluation(compiled_once):
    document = document_in(compiled_once(RECIPES[1]))
    spec = json_format.ParseDict(document, pipeline_spec_pb2.PipelineSpec())
    tasks = _dag(spec).tasks
    stages = {_stage_of(name, task): name for name, task in tasks.items()}
    reads = {
        stage: {a.task_output_artifact.producer_task for a in tasks[n].inputs.artifacts.values()}
        for stage, n in stages.items()
        if stage != "resolve"
    }
    before = {"data", "pretrain", "sft"}
    assert reads["rl_40960"] == before
    assert reads["rl_49152"] == {*before, stages["rl_40960"]}
    assert reads["evaluate"] == reads["register"] == {*before, stages["rl_81920"]}


def test_a_misspelt_field_in_the_specification_is_refused(compiled_once):
    document = document_in(compiled_once(RECIPES[0]))
    document["bogusField"] = 1
    with pytest.raises(json_format.ParseError, match="bogusField"):
        json_format.ParseDict(document, pipeline_spec_pb2.PipelineSpec())


def test_a_stage_absent_from_the_recipe_is_absent_from_the_dag(tmp_path):
    recipe = load_recipe([ROOT / RECIPES[2]]).model_copy(update={"sft": None, "register_": None})
    document = compiled(recipe, tmp_path / "p.yaml")
    assert set(document["root"]["dag"]["tasks"]) == {
        "resolve",
        "data",
        "pretrain",
        "rl",
        "evaluate",
    }


@pytest.mark.parametrize("name", RECIPES[1:3])
def test_a_components_recipe_has_the_hashes_of_the_whole_and_nothing_of_later_stages(name):
    recipe = load_recipe([ROOT / name])
    whole = stage_hashes(recipe)
    for stage in stages_of(recipe):
        reduced = Recipe.model_validate_json(
            stage_recipe(stage, recipe).model_dump_json(by_alias=True)
        )
        assert stage_hashes(reduced)[stage] == whole[stage]
    assert stage_recipe("pretrain", recipe).rl is None


def test_the_compiled_yaml_runs_locally(tmp_path):
    recipe = load_recipe([ROOT / RECIPES[2]], overrides=[f"storage.root={tmp_path}/runs"])
    recipe = recipe.model_copy(
        update={"sft": None, "rl": None, "evaluate": None, "register_": None}
    )
    path = tmp_path / "pipeline.yaml"
    compiled(recipe, path)
    load_pipelines("local").run_compiled(
        path, pipeline_root=tmp_path / "kfp", log=tmp_path / "log.txt"
    )
    pointers = finished_stages(recipe)
    assert list(pointers) == ["data", "pretrain"]
    emitted = json.loads(next((tmp_path / "kfp").rglob("pretrain/output")).read_text())
    assert emitted["digest"] == pointers["pretrain"].digest
