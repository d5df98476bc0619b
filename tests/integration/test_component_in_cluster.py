"""A KFP component in its pod: what it makes in the cluster, whose it is, and its rights."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from published_schemas import FOLDERS, schema_of
from trainjob_cases import RUN, SERVERS, body_of, program

from m1.config.loading import recipe_json
from m1.config.schema import Recipe
from m1.config.stages import stage_hashes
from m1.launch import StageArtifacts, run_component
from m1.launcher.cluster import Cluster, ClusterError
from m1.launcher.rollout import surroundings
from m1.launcher.teardown import tear_down
from m1.stage import finished, pointer_key, stage_folder
from m1.storage import folder_digest, open_storage, publish_pointer
from m1.types import M1Error, Pointer

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    schema_of("trainer.kubeflow.org/v1alpha1", "TrainJob") is None,
    reason=f"no published schema of a TrainJob in {FOLDERS} (M1_CRDS)",
)
WORKFLOW = {
    "apiVersion": "argoproj.io/v1alpha1",
    "kind": "Workflow",
    "name": "m1-mini-x7k2p",
    "uid": "6f9c1a1e",
}
POD = "m1-mini-x7k2p-system-container-impl-1847"


@pytest.fixture
def in_a_pod(monkeypatch):
    """Let this process think that it is a component's pod of a cluster that an API plays."""

    def enter(api, namespace="team"):
        from kubernetes.config import kube_config

        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
        monkeypatch.setenv("KFP_POD_NAME", POD)
        monkeypatch.setenv("M1_NAMESPACE", namespace)
        monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(api.kubeconfig()))
        # As Argo makes its pods: the workflow controls them.
        owners = [WORKFLOW | {"controller": True, "blockOwnerDeletion": True}]
        others = [{"apiVersion": "v1", "kind": "ConfigMap", "name": "another", "uid": "1"}]
        pod = {"metadata": {"name": POD, "ownerReferences": others + owners}}
        api.kept["pods", POD] = pod | {"spec": {"containers": [{"name": "main"}]}}

    return enter


def component(stage, recipe, folder, inputs=()):
    """Run a component's body; the pointer it hands on, and the artifact's metadata."""
    output = SimpleNamespace(path=str(folder / "output"), metadata={})
    shown = SimpleNamespace(log_metric=lambda name, value: None)
    pages = [SimpleNamespace(path=str(folder / name)) for name in ("report", "summary")]
    given = {}
    for pointer in inputs:
        path = folder / pointer.stage
        path.write_text(json.dumps(asdict(pointer)))
        given[pointer.stage] = SimpleNamespace(path=str(path))
    run_component(
        stage,
        recipe_json(recipe),
        inputs=given,
        output=output,
        artifacts=StageArtifacts(shown, *pages),
        run=RUN,
    )
    return json.loads(Path(output.path).read_text()), output.metadata


def made_by_a_pod(stage, folder):
    """What a TrainJob's pods do in the end: the stage's files and its pointer."""

    def play(job, pod):
        if pod["index"] == 0:
            (path,) = [a for a in job["spec"]["trainer"]["args"] if a.startswith("/")]
            work = json.loads((Path(path) / "ranks.json").read_text())
            assert work["inputs"].keys() == {"data"}
            done(stage, Recipe.model_validate(work["recipe"]))
        return "Succeeded"

    return play


def done(stage, recipe):
    """Leave a stage's result, as a finished run of it does."""
    storage = open_storage(recipe.storage.root)
    stage_hash = stage_hashes(recipe)[stage]
    folder = stage_folder(stage, recipe) / "output"
    folder.mkdir(parents=True)
    (folder / "file").write_text("made")
    pointer = Pointer(stage, stage_hash, str(folder), folder_digest(folder), 6, {"seconds": 1.0})
    return publish_pointer(storage, pointer_key(stage, stage_hash), pointer)


def test_a_component_hands_on_what_the_pods_of_its_trainjob_made(launching, in_a_pod, tmp_path):
    api, _, job, _ = launching(made_by_a_pod("pretrain", tmp_path))
    in_a_pod(api)
    recipe = job.recipe
    data = done("data", recipe)
    pointer, metadata = component("pretrain", recipe, tmp_path, [data])
    name = f"m1-pretrain-{stage_hashes(recipe)['pretrain'][:12]}"
    assert api.made == [("trainjobs", name)] and not api.refused
    assert pointer == asdict(finished("pretrain", recipe)) and pointer["step"] == 6
    assert metadata["uri"] == pointer["uri"] and metadata["digest"] == pointer["digest"]
    (made,) = api.jobs()
    assert made["metadata"]["ownerReferences"] == [WORKFLOW]
    assert made["metadata"]["labels"]["m1/run"] == "run-1"
    again, _ = component("pretrain", recipe, tmp_path, [data])
    assert again == pointer and len(api.made) == 1  # done: nothing is asked of the cluster


def test_a_component_whose_trainjob_fails_fails(launching, in_a_pod, tmp_path):
    api, _, job, _ = launching(program("raise SystemExit('out of memory')"))
    in_a_pod(api)
    data = done("data", job.recipe)
    with pytest.raises(M1Error, match=r"(?s)JobsFailed.*out of memory"):
        component("pretrain", job.recipe, tmp_path, [data])
    assert not (tmp_path / "output").exists()


def test_what_a_run_makes_belongs_to_its_workflow_in_the_same_namespace_only(
    launching, in_a_pod, monkeypatch
):
    api, launcher, job, _ = launching(sets=SERVERS)
    in_a_pod(api)
    around = surroundings("rl", job.recipe, launcher._cluster, run=RUN, say=lambda _: None)
    with around:
        made = [item for (kind, _), item in api.kept.items() if kind != "pods"]
        assert len(made) == 3
        assert [item["metadata"]["ownerReferences"] for item in made] == [[WORKFLOW]] * 3
    monkeypatch.setenv("M1_NAMESPACE", "kubeflow")  # an owner elsewhere would delete it at once
    assert launcher._cluster.owner() == []
    monkeypatch.setenv("M1_NAMESPACE", "team")
    monkeypatch.delenv("KFP_POD_NAME")
    assert launcher._cluster.owner() == []


def test_the_role_allows_what_components_ask_for_and_nothing_else(launching, in_a_pod):
    api, launcher, job, _ = launching(program("raise SystemExit('end')"), sets=SERVERS)
    in_a_pod(api)
    for _ in range(2):  # the second deletes the job of the first
        with pytest.raises(M1Error, match="JobsFailed"):
            launcher.run(job)
    around = surroundings("rl", job.recipe, launcher._cluster, run=RUN, say=lambda _: None)
    with around:
        pass
    around = surroundings("rl", job.recipe, launcher._cluster, run=RUN, say=lambda _: None)
    around.__enter__()  # and the component is killed
    launcher._ensure(body_of(launcher, job), job)
    assert len(tear_down(launcher._cluster, "run-1")) == 4
    assert not api.refused
    assert api.rights == allowed("m1-launcher")


def allowed(role):
    """(group, resource, verb) of a Role of pipelines."""
    text = (ROOT / "manifests" / "base" / "kfp" / "runner.yaml").read_text()
    (found,) = [
        item
        for item in yaml.safe_load_all(text)
        if item["kind"] == "Role" and item["metadata"]["name"] == role
    ]
    return {
        (group, resource, verb)
        for rule in found["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


@pytest.mark.parametrize("stage", ["rl", "evaluate"])
def test_a_stage_whose_sandboxes_are_not_isolated_does_not_start(
    launching, in_a_pod, tmp_path, stage
):
    api, _, job, _ = launching(sets=["resources.sandboxes.namespace=m1-sandbox"])
    in_a_pod(api)
    with pytest.raises(M1Error, match="m1-sandbox has no NetworkPolicy that denies all traffic"):
        component(stage, job.recipe, tmp_path)
    assert not api.made


def test_a_field_that_kubernetes_does_not_know_is_refused(launching):
    from m1.launcher import rollout_objects

    api, launcher, job, _ = launching(sets=SERVERS)
    made = rollout_objects.deployment(
        job.recipe.resources.rollout, launcher._identity(job), image="m1"
    )
    made["spec"]["template"]["spec"]["containers"][0]["enableGpus"] = True
    cluster = launcher._cluster
    with pytest.raises(ClusterError, match="enableGpus"):
        cluster.calling(lambda: cluster.apps.create_namespaced_deployment("team", made))
    assert api.refused and not api.made


def test_servers_of_a_stage_meet_the_restricted_standard_and_get_no_token(launching):
    from m1.launcher import rollout_objects

    _, launcher, job, _ = launching(sets=[*SERVERS, "resources.rollout.resources.memory=64Gi"])
    made = rollout_objects.deployment(
        job.recipe.resources.rollout, launcher._identity(job), image="m1"
    )
    pod = made["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["priorityClassName"] == "high"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    written = {mount["mountPath"] for mount in container["volumeMounts"]}
    home = [e["value"] for e in container["env"] if e["name"] == "HOME"]
    assert written == {"/tmp"} and home == ["/tmp"]
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()


def test_without_a_cluster_it_is_said_so(tmp_path):
    with pytest.raises(ClusterError, match="no cluster is configured"):
        Cluster(kubeconfig=str(tmp_path / "absent"))
