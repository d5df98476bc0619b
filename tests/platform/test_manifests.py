import json
import re

import jsonschema
import kubernetes_validate
import pytest
from published_schemas import FOLDERS, schema_of
from rendering import MANIFESTS, containers, is_builtin, key_of, pod_specs, render

from images.build import COMPONENT, pin, read_lock
from m1.config.resource_tables import StageResources, TrainerConfig
from m1.launcher import objects
from m1.launcher.job import RunLabels

KUBERNETES = ("1.28", "1.33", "1.37")
OVERLAYS = ("kind", "cluster")
CUSTOM = (
    "kueue.x-k8s.io/v1beta2/ClusterQueue",
    "kueue.x-k8s.io/v1beta2/LocalQueue",
    "kueue.x-k8s.io/v1beta2/ResourceFlavor",
    "kueue.x-k8s.io/v1beta2/WorkloadPriorityClass",
    "monitoring.coreos.com/v1/PodMonitor",
    "monitoring.coreos.com/v1/PrometheusRule",
    "monitoring.coreos.com/v1/ServiceMonitor",
    "trainer.kubeflow.org/v1alpha1/ClusterTrainingRuntime",
)
ALLOWED_VOLUMES = {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
PLUGIN_FIELDS = {"endpoint", "timeout", "tls", "settings"}
PLUGIN_SETTINGS = {
    "workspacesEnabled", "authType", "credentialSecretRef", "experimentDescription",
    "defaultExperimentName", "kfpBaseURL", "kfpRunURLPathTemplate", "mlflowBaseURL",
    "mlflowUIPathPrefix", "injectUserEnvVars",
}  # fmt: skip
"""Of MLflowPluginConfig and MLflowPluginSettings in kubeflow/pipelines 2.17.0."""


def overlay(name):
    return render(MANIFESTS / "overlays" / name)


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_knows_every_field_of_its_own_kinds(name, version):
    own = [item for item in overlay(name) if is_builtin(item)]
    assert len(own) > 30
    for item in own:
        kubernetes_validate.validate(item, version, strict=True)


def test_the_schemas_of_kubernetes_refuse_an_unknown_field():
    (item,) = [i for i in overlay("kind") if key_of(i)[0::2] == ("Deployment", "mlflow")]
    changed = json.loads(json.dumps(item))
    changed["spec"]["template"]["spec"]["containers"][0]["readOnlyRootFilesystem"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(changed, "1.33", strict=True)


@pytest.mark.parametrize("kind", CUSTOM)
def test_custom_resources_fit_their_published_schemas(kind):
    api_version, _, kind = kind.rpartition("/")
    schema = schema_of(api_version, kind)
    if schema is None:
        pytest.skip(f"no schema of {api_version} {kind} in {FOLDERS} (M1_CRDS)")
    found = [item for item in overlay("cluster") if item["kind"] == kind]
    assert found
    for item in found:
        assert item["apiVersion"] == api_version
        jsonschema.Draft202012Validator(schema).validate(item)


def test_the_trainer_s_runtime_makes_a_job_set():
    schema = schema_of("jobset.x-k8s.io/v1alpha2", "JobSet")
    if schema is None:
        pytest.skip(f"no schema of a JobSet in {FOLDERS} (M1_CRDS)")
    (item,) = [i for i in overlay("cluster") if i["kind"] == "ClusterTrainingRuntime"]
    made = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {}}
    made["spec"] = item["spec"]["template"]["spec"]
    jsonschema.Draft202012Validator(schema).validate(made)


def test_a_trainjob_of_ours_fits_the_runtime_that_it_names():
    trainer = TrainerConfig()
    (runtime,) = [i for i in overlay("cluster") if i["kind"] == trainer.runtime_kind]
    assert runtime["metadata"]["name"] == trainer.runtime
    identity = objects.Identity("job", "kubeflow", "pretrain", "0" * 64, RunLabels("run"))
    asked = StageResources(num_nodes=2, shared_memory="16Gi")
    options = {"image": "m1", "folder": "/scratch/x", "num_processes": 2}
    made = objects.train_job(identity, asked, trainer, **options)["spec"]
    (patch,) = made["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    (base,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert job["name"] == base["name"] == objects.NODE
    (patched,) = job["template"]["spec"]["template"]["spec"]["containers"]
    (container,) = base["template"]["spec"]["template"]["spec"]["containers"]
    assert patched["name"] == container["name"] == objects.NODE
    (queue,) = {i["metadata"]["name"] for i in overlay("cluster") if i["kind"] == "LocalQueue"}
    assert f"`{trainer.runtime}`" in (MANIFESTS / "README.md").read_text()
    assert f"`{queue}`" in (MANIFESTS / "README.md").read_text()


def test_no_custom_resource_is_forgotten():
    items = [item for item in overlay("cluster") if not is_builtin(item)]
    assert {f"{item['apiVersion']}/{item['kind']}" for item in items} == set(CUSTOM)


def test_a_published_schema_refuses_an_unknown_field():
    schema = schema_of("trainer.kubeflow.org/v1alpha1", "ClusterTrainingRuntime")
    if schema is None:
        pytest.skip(f"no schema of a ClusterTrainingRuntime in {FOLDERS} (M1_CRDS)")
    (item,) = [i for i in overlay("cluster") if i["kind"] == "ClusterTrainingRuntime"]
    changed = json.loads(json.dumps(item))
    changed["spec"]["mlPolicy"]["torch"]["numberOfNodes"] = 2
    with pytest.raises(jsonschema.ValidationError, match="numberOfNodes"):
        jsonschema.Draft202012Validator(schema).validate(changed)


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_two_objects_have_one_name(name):
    keys = [key_of(item) for item in overlay(name)]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_pod_meets_the_restricted_pod_security_standard(name):
    specs = dict(pod_specs(overlay(name)))
    assert {"minio", "mlflow", "mlflow-postgres", "m1-rollout", "minio-setup"} <= specs.keys()
    for owner, spec in specs.items():
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}, owner
        assert spec["securityContext"]["runAsNonRoot"] is True, owner
        assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", owner
        for volume in spec.get("volumes", ()):
            assert volume.keys() - {"name"} <= ALLOWED_VOLUMES, (owner, volume)
        for container in containers(spec):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, owner
            assert security["capabilities"] == {"drop": ["ALL"]}, owner
            assert security["readOnlyRootFilesystem"] is True, owner


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_pod_of_ours_gets_a_token_of_the_api_server(name):
    for owner, spec in pod_specs(overlay(name)):
        assert spec["automountServiceAccountToken"] is False, owner


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_container_says_what_it_needs_and_how_it_is_seen_to_live(name):
    jobs = {"minio-setup", "m1-torch"}
    for owner, spec in pod_specs(overlay(name)):
        for container in containers(spec):
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), owner
            assert "memory" in container["resources"]["limits"], owner
        if owner not in jobs:
            for container in spec["containers"]:
                assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()


@pytest.mark.parametrize("name", OVERLAYS)
def test_secrets_are_named_and_never_written(name):
    items = overlay(name)
    assert "Secret" not in {item["kind"] for item in items}
    for owner, spec in pod_specs(items):
        for container in containers(spec):
            for variable in container.get("env", ()):
                if re.search("PASSWORD|SECRET|TOKEN|KEY", variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"], (owner, variable["name"])


def test_the_runbook_makes_every_secret_that_is_named():
    text = (MANIFESTS / "README.md").read_text()
    named = set()
    for _, spec in pod_specs(overlay("cluster")):
        for container in containers(spec):
            for variable in container.get("env", ()):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                if reference:
                    named.add((reference["name"], reference["key"]))
        for volume in spec.get("volumes", ()):
            if "secret" in volume:
                named.add((volume["secret"]["secretName"], None))
    assert len(named) >= 7
    for secret, key in named:
        (line,) = set(re.findall(rf"^ *secret \S+ {secret} .*$", text, re.MULTILINE)) or {""}
        assert line, f"the runbook does not make {secret}"
        assert key is None or f" {key}=" in line, f"the runbook makes {secret} without {key}"


def test_images_are_those_of_the_lock_by_digest():
    assert COMPONENT.read_text() == pin()
    lock = read_lock()
    for entry in [*lock["bases"].values(), *lock["services"].values()]:
        assert re.fullmatch("sha256:[0-9a-f]{64}", entry["digest"])
    allowed = {
        f"{entry['image']}@{entry['digest']}" if entry["digest"] else f"{entry['image']}:unpushed"
        for entry in [*lock["services"].values(), *lock["built"].values()]
    }
    for name in OVERLAYS:
        for owner, spec in pod_specs(overlay(name)):
            for container in containers(spec):
                assert container["image"] in allowed, (owner, container["image"])


def test_roles_name_what_they_allow():
    roles = [item for item in overlay("cluster") if item["kind"] in ("Role", "ClusterRole")]
    assert {item["metadata"]["name"] for item in roles} >= {"m1-pipeline", "m1-launcher"}
    for role in roles:
        assert role["kind"] == "Role"  # nothing of ours is allowed in all namespaces
        for rule in role["rules"]:
            assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
            assert "secrets" not in rule["resources"] or rule.get("resourceNames")


def test_every_binding_binds_a_role_that_exists():
    items = overlay("cluster")
    keys = {key_of(item) for item in items}
    bindings = [item for item in items if item["kind"] == "RoleBinding"]
    assert bindings
    for item in bindings:
        assert ("Role", item["metadata"]["namespace"], item["roleRef"]["name"]) in keys
        for subject in item["subjects"]:
            assert ("ServiceAccount", subject["namespace"], subject["name"]) in keys


@pytest.mark.parametrize("name", OVERLAYS)
def test_selectors_of_services_budgets_and_policies_meet_a_pod(name):
    items = overlay(name)
    labels = [
        (item["metadata"]["namespace"], item["spec"]["template"]["metadata"]["labels"])
        for item in items
        if item["kind"] in ("Deployment", "StatefulSet", "Job")
    ]
    labels.append(("kubeflow", {"app.kubernetes.io/name": "m1-train"}))  # made by TrainJobs
    for item in items:
        spec, kind = item.get("spec", {}), item["kind"]
        if kind == "Service":
            wanted = {"matchLabels": spec["selector"]}
        elif kind in ("PodDisruptionBudget", "NetworkPolicy"):
            wanted = spec.get("selector", spec.get("podSelector"))
        else:
            continue
        if item["metadata"]["namespace"] == "m1-sandbox":
            assert wanted == {}  # all pods
            continue
        exact = wanted.get("matchLabels", {}).items()
        present = {e["key"] for e in wanted.get("matchExpressions", ())}
        assert any(
            namespace == item["metadata"]["namespace"]
            and exact <= found.items()
            and present <= found.keys()
            for namespace, found in labels
        ), key_of(item)


def test_sandboxes_reach_nothing_and_are_bounded():
    items = {key_of(item): item for item in render(MANIFESTS / "base" / "sandbox")}
    policy = items[("NetworkPolicy", "m1-sandbox", "m1-sandbox-no-network")]["spec"]
    assert policy == {
        "podSelector": {}, "policyTypes": ["Ingress", "Egress"], "ingress": [], "egress": [],
    }  # fmt: skip
    labels = items[("Namespace", "", "m1-sandbox")]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert items[("ResourceQuota", "m1-sandbox", "m1-sandbox")]["spec"]["hard"]["services"] == "0"
    assert items[("RuntimeClass", "", "gvisor")]["handler"] == "runsc"


def test_kfp_nests_our_runs_in_its_own():
    (item,) = [
        i for i in overlay("kind") if i["kind"] == "ConfigMap" and "config.json" in i["data"]
    ]
    config = json.loads(item["data"]["config.json"])
    plugin = config["plugins"]["mlflow"]
    assert plugin.keys() <= PLUGIN_FIELDS
    assert plugin["settings"].keys() <= PLUGIN_SETTINGS
    assert plugin["settings"]["injectUserEnvVars"] is True
    services = {key_of(i): i for i in overlay("kind") if i["kind"] == "Service"}
    host, port = re.fullmatch(r"http://(.+):(\d+)", plugin["endpoint"]).groups()
    service, namespace = host.split(".")[:2]
    assert services[("Service", namespace, service)]["spec"]["ports"][0]["port"] == int(port)
    assert config["DEFAULTPIPELINERUNNERSERVICEACCOUNT"] == "m1-pipeline"
