"""What `[resources]` become in the compiled pipeline, and what a person may change in the UI."""

import json
from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2 as executor_config
from kfp.pipeline_spec import pipeline_spec_pb2 as pipeline_spec

from m1.config.loading import RecipeError, load_recipe, recipe_json
from m1.config.schema import Recipe
from m1.config.stages import recipe_hash, stage_hashes
from m1.launch import run_component, with_places
from m1.pipeline import load_pipelines
from m1.resolving import fixed_parts, places_json, recipe_line, resolve, stage_json
from m1.types import M1Error

ROOT = Path(__file__).parents[2]
MINI = ROOT / "tests/recipes/mini.toml"
IMAGE = 'image="registry.example.com/m1@sha256:1"'
VOLUME = '[{claim="work", path="/work", is_shared=true}]'
RESOURCES = [
    IMAGE,
    "storage.root=/work/runs",
    "tracking.uri=https://mlflow.example.com",
    "resources.ttl_seconds=86400",
    "resources.deadline_seconds=604800",
    "resources.default.memory=8Gi",
    "resources.default.retries=2",
    f"resources.default.volumes={VOLUME}",
    'resources.default.secrets=[{name="s3", environment={secret="AWS_SECRET_ACCESS_KEY"}}]',
    "resources.evaluate.num_accelerators=8",
    "resources.evaluate.accelerator=amd.com/gpu",
    "resources.evaluate.cpu=16",
    "resources.evaluate.shared_memory=64Gi",
    'resources.evaluate.node_selector={"pool"="gpu"}',
    'resources.evaluate.tolerations=[{key="gpu", operator="Equal", value="yes"}]',
    "resources.evaluate.timeout_seconds=7200",
    "resources.data.cache=false",
    "resources.sft.cache_key=mine",
]
TRAINJOB = [
    "pretrain.parallel.data=4",
    "pretrain.micro_batch_rows=1",
    "resources.pretrain.launcher=trainjob",
    "resources.pretrain.num_nodes=2",
    "resources.pretrain.num_accelerators=2",
    "resources.pretrain.timeout_seconds=3600",
]


def compiled(recipe, folder, only=""):
    """Pipeline and platform specification, each parsed strictly."""
    path = folder / f"{recipe.name}{only}.yaml"
    load_pipelines("compile").compile_pipeline(recipe, path, only)
    documents = list(yaml.safe_load_all(path.read_text()))
    spec = json_format.ParseDict(documents[0], pipeline_spec.PipelineSpec())
    if len(documents) == 1:
        return documents[0], spec, {}
    platform = json_format.ParseDict(documents[1], pipeline_spec.PlatformSpec())
    assert set(platform.platforms) == {"kubernetes"}
    found = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for executor in found.values():
        json_format.ParseDict(executor, executor_config.KubernetesExecutorConfig())
    return documents[0], spec, found | {"": documents[1]["platforms"]["kubernetes"]}


@pytest.fixture(scope="module")
def equipped(tmp_path_factory):
    recipe = load_recipe([MINI], overrides=RESOURCES)
    return recipe, *compiled(recipe, tmp_path_factory.mktemp("compiled"))


def test_a_stages_own_table_goes_over_the_default(equipped):
    _, document, spec, platform = equipped
    containers = {
        name: executor["container"]
        for name, executor in document["deploymentSpec"]["executors"].items()
    }
    asked = containers["exec-evaluate"]["resources"]
    accelerator = asked["accelerator"]
    assert accelerator["resourceType"] == "amd.com/gpu" and accelerator["resourceCount"] == "8"
    assert asked["resourceMemoryLimit"] == asked["resourceMemoryRequest"] == "8Gi"
    assert asked["resourceCpuLimit"] == "16"
    assert "accelerator" not in containers["exec-rl"]["resources"]
    place = platform["exec-evaluate"]
    assert place["nodeSelector"]["labels"] == {"pool": "gpu"}
    assert place["tolerations"] == [{"key": "gpu", "operator": "Equal", "value": "yes"}]
    assert place["emptyDirMounts"][0]["mountPath"] == "/dev/shm"
    assert place["emptyDirMounts"][0]["medium"] == "Memory"
    assert place["activeDeadlineSeconds"] == "7200"
    assert "nodeSelector" not in platform["exec-rl"]
    for name, executor in platform.items():
        if name:
            assert executor["pvcMount"][0]["mountPath"] == "/work"
    config = platform[""]["pipelineConfig"]
    assert config == {"activeDeadlineSeconds": 604800, "resourceTtlOnCompletion": 86400}
    tasks = spec.root.dag.tasks
    assert tasks["rl"].retry_policy.max_retry_count == 2
    assert not tasks["data"].caching_options.enable_cache
    assert tasks["sft"].caching_options.cache_key == "mine"


def test_secrets_are_references_and_places_no_part_of_a_stages_parameters(equipped, monkeypatch):
    recipe, document, _, platform = equipped
    (secret,) = platform["exec-rl"]["secretAsEnv"]
    assert secret["keyToEnv"][0]["envVar"] == "AWS_SECRET_ACCESS_KEY"
    for stage, stage_hash in stage_hashes(recipe).items():
        text = stage_json(stage, recipe)
        assert "mlflow.example.com" not in text and "8Gi" not in text
        assert stage_hashes(Recipe.model_validate_json(text))[stage] == stage_hash
    container = document["deploymentSpec"]["executors"]["exec-rl"]["container"]
    (places,) = [e["value"] for e in container["env"] if e["name"] == "M1_PLACES"]
    assert json.loads(places)["tracking"]["uri"] == "https://mlflow.example.com"


def test_a_recipe_written_out_in_full_asks_for_the_same():
    sets = [*RESOURCES, "resources.default.cache=false", "resources.data.cache=true"]
    recipe = load_recipe([MINI], overrides=sets)
    assert recipe.resources.of("data").cache and not recipe.resources.of("rl").cache
    assert recipe.resources.of("evaluate").memory == recipe.resources.of("rl").memory == "8Gi"
    assert Recipe.model_validate_json(recipe_json(recipe)) == recipe
    assert resolve(recipe_line(recipe), "", fixed=fixed_parts(recipe)) == recipe


def test_a_stage_gets_all_its_places_by_the_environment(monkeypatch):
    servers = ['rl.rollout.urls=["cluster"]', "resources.rollout.source=/work/base"]
    recipe = load_recipe([MINI], overrides=[*RESOURCES, *servers])
    monkeypatch.setenv("M1_PLACES", places_json(recipe))
    for stage in stage_hashes(recipe):
        found = with_places(Recipe.model_validate_json(stage_json(stage, recipe)))
        assert (found.resources, found.tracking, found.image) == (
            recipe.resources, recipe.tracking, recipe.image,
        )  # fmt: skip


def test_where_a_recipe_runs_is_no_part_of_its_hash():
    plain = load_recipe([MINI], overrides=[IMAGE])
    elsewhere = load_recipe([MINI], overrides=[*RESOURCES, "ci.submit=true"])
    assert recipe_hash(plain) == recipe_hash(elsewhere)
    assert stage_hashes(plain) == stage_hashes(elsewhere)


def test_a_run_with_trainjobs_has_an_exit_handler_and_small_launching_pods(tmp_path):
    recipe = load_recipe([MINI], overrides=[*RESOURCES, *TRAINJOB])
    document, spec, platform = compiled(recipe, tmp_path)
    assert spec.root.dag.tasks["teardown"].trigger_policy.strategy == 2  # ALL_UPSTREAM_COMPLETED
    container = document["deploymentSpec"]["executors"]["exec-pretrain"]["container"]
    assert container["resources"]["resourceCpuLimit"] == "500m"
    assert "accelerator" not in container["resources"]
    assert "activeDeadlineSeconds" not in platform["exec-pretrain"]  # the TrainJob's
    group = next(c for n, c in spec.components.items() if n.startswith("comp-exit-handler"))
    given = group.dag.tasks["pretrain"].inputs.parameters
    assert given["run_id"].runtime_value.constant.string_value == "{{$.pipeline_job_uuid}}"
    assert "run_id" not in group.dag.tasks["sft"].inputs.parameters


@pytest.mark.parametrize(
    ("only", "stages"),
    [
        ("data", {"data"}),
        ("rl", {"data", "pretrain", "rl"}),
        ("evaluate", {"data", "pretrain", "evaluate"}),
    ],
)
def test_a_part_of_the_pipeline_is_a_pipeline(tmp_path, only, stages):
    recipe = load_recipe([MINI])
    document, spec, _ = compiled(recipe, tmp_path, only)
    assert set(spec.root.dag.tasks) == {"resolve", *stages}
    assert document["pipelineInfo"]["name"] == f"m1-mini-{only}"
    parameters = document["root"]["inputDefinitions"]["parameters"]
    assert ("checkpoint" in parameters) == (only != "data")
    assert {"recipe", "overrides", "run_name", "priority"} <= set(parameters)
    if only != "data":
        fixed, text = fixed_parts(recipe, only), recipe_line(recipe)
        part = resolve(text, "", fixed=fixed, checkpoint="s3://m1/base")
        assert part.pretrain.num_steps == 0 and part.pretrain.start == "s3://m1/base"
        with pytest.raises(M1Error, match="none is given"):
            resolve(text, "", fixed=fixed)
    with pytest.raises(M1Error, match="no pipeline of 'sft' only"):
        compiled(recipe, tmp_path, "sft")


def test_overrides_and_recipes_as_text_change_what_a_run_computes():
    recipe = load_recipe([MINI])
    fixed = fixed_parts(recipe)
    assert resolve(recipe_line(recipe), "", fixed=fixed) == recipe
    assert resolve(MINI.read_text(), " \n", fixed=fixed) == recipe  # TOML too
    changed = resolve(MINI.read_text(), "rl.group_size=8\n\nseed=5\n", fixed=fixed)
    assert changed.rl is not None and changed.rl.group_size == 8 and changed.seed == 5


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("rl.group_size=1", "rl.group_size"),
        ("resources.default.memory=1Gi", "change resources"),
        ("image=other", "change image"),
        ("tracking.experiment=other", "change tracking"),
        ("rl.lengths=[{max_new_tokens=8, min_steps=1, max_steps=1}]", "change the stages"),
        ("nonsense", "dotted.key=value"),
    ],
)
def test_what_needs_another_pipeline_is_refused_with_the_reason(overrides, said):
    recipe = load_recipe([MINI])
    with pytest.raises(M1Error, match=said):
        resolve(recipe_line(recipe), overrides, fixed=fixed_parts(recipe))


def test_text_that_is_no_recipe_is_refused():
    fixed = fixed_parts(load_recipe([MINI]))
    for text in ("{broken", "a = [", ""):
        with pytest.raises(M1Error, match="recipe"):
            resolve(text, "", fixed=fixed)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["resources.pretrain.num_nodes=2"], "torchrun starts processes in one pod"),
        ([*TRAINJOB], "lies on no volume with is_shared"),
        ([*RESOURCES, *TRAINJOB, "resources.pretrain.num_nodes=3"], "must divide"),
        ([*RESOURCES, *TRAINJOB, "resources.pretrain.num_accelerators=1"], "raise it"),
        (["resources.default.memory=lots"], "resources.default.memory"),
        ([f"resources.rl.volumes={VOLUME[:-1]}, {VOLUME[1:]}"], "several entries at /work"),
        (['resources.rl.tolerations=[{operator="Equal"}]'], "Equal needs a value"),
        (["resources.rollout.source=/work/x"], "does not name them"),
        (["resources.rollout.min_replicas=2"], "max_replicas is 1"),
    ],
)
def test_resources_that_cannot_work_are_refused(sets, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe([MINI], overrides=sets)


def test_a_result_of_another_recipe_that_a_cache_handed_on_is_refused(tmp_path):
    recipe = load_recipe([MINI], overrides=[f"storage.root={tmp_path}"])
    pointer = tmp_path / "pointer"
    strange = {"stage": "data", "stage_hash": "0" * 64, "uri": "x", "digest": "y", "step": None}
    pointer.write_text(json.dumps(strange | {"metadata": {}}))

    class Artifact:
        path = str(pointer)

    with pytest.raises(M1Error, match=r"resources\.data\.cache_key"):
        run_component(
            "pretrain",
            stage_json("pretrain", recipe),
            inputs={"data": Artifact()},
            output=None,
            artifacts=None,
        )


def test_manifests_for_gitops_are_what_the_published_definitions_take(tmp_path):
    compiling = load_pipelines("compile")
    recipe = load_recipe([MINI], overrides=RESOURCES)
    for name in ("a", "b"):
        compiling.compile_manifests(recipe, tmp_path / name, namespace="team")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    pipeline, version = yaml.safe_load_all((tmp_path / "a").read_text())
    assert (pipeline["kind"], version["kind"]) == ("Pipeline", "PipelineVersion")
    assert {o["apiVersion"] for o in (pipeline, version)} == {"pipelines.kubeflow.org/v2beta1"}
    assert {o["metadata"]["namespace"] for o in (pipeline, version)} == {"team"}
    # The definition's own bounds: name of the pipeline, and an object as specification.
    assert set(version["spec"]) <= {
        "codeSourceURL", "description", "displayName", "pipelineName", "pipelineSpec",
        "pipelineSpecURI", "platformSpec", "tags", "versionName",
    }  # fmt: skip
    assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"] == "m1-mini"
    assert version["metadata"]["name"] == compiling.version_name(recipe)
    json_format.ParseDict(version["spec"]["pipelineSpec"], pipeline_spec.PipelineSpec())
    json_format.ParseDict(version["spec"]["platformSpec"], pipeline_spec.PlatformSpec())


def test_the_version_follows_content_and_image(monkeypatch):
    name = load_pipelines("compile").version_name
    recipe = load_recipe([MINI], overrides=[IMAGE])
    assert name(recipe, "data") == name(recipe, "data")
    others = [
        load_recipe([MINI], overrides=[IMAGE, "seed=2"]),
        load_recipe([MINI], overrides=['image="registry.example.com/m1@sha256:2"']),
    ]
    assert len({name(r, "data") for r in (recipe, *others)}) == 3


def test_no_planted_secret_is_compiled(tmp_path, monkeypatch):
    for variable in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_TOKEN", "M1_KFP_TOKEN"):
        monkeypatch.setenv(variable, "planted-secret")
    recipe = load_recipe([MINI], overrides=[*RESOURCES, *TRAINJOB])
    path = tmp_path / "p.yaml"
    load_pipelines("compile").compile_pipeline(recipe, path)
    load_pipelines("compile").compile_manifests(recipe, tmp_path / "m.yaml", namespace="n")
    assert "planted-secret" not in path.read_text() + (tmp_path / "m.yaml").read_text()
