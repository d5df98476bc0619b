"""A component's work on one node of Kubernetes 1.20, with the rights of the account it runs as."""

import base64
import time
from pathlib import Path

import pytest
import yaml

from m1.config.loading import load_recipe
from m1.config.resource_tables import SandboxCheckConfig
from m1.launcher import objects, rollout_objects
from m1.launcher.cluster import Cluster, ClusterError
from m1.launcher.job import RunLabels
from m1.launcher.rollout import RolloutServers, check_sandboxes
from m1.launcher.teardown import tear_down

pytestmark = pytest.mark.cluster
IDENTITY = objects.Identity("m1-component", "kubeflow", "rl", "0" * 64, RunLabels("run-1"))
MINI = Path(__file__).parents[1] / "recipes" / "mini.toml"


@pytest.fixture(scope="module")
def account(platform, tmp_path_factory):
    """A kubeconfig with the token of `m1-pipeline`, as whom pipelines run."""
    tokens = []
    deadline = time.monotonic() + 60
    while not tokens and time.monotonic() < deadline:
        found = platform.core.list_namespaced_secret("kubeflow").items
        tokens = [s for s in found if s.metadata.name.startswith("m1-pipeline-token")]
        time.sleep(0.2)
    config = yaml.safe_load(Path(platform.cluster.kubeconfig).read_text())
    (user,) = config["users"]
    user["user"] = {"token": base64.b64decode(tokens[0].data["token"]).decode()}
    path = tmp_path_factory.mktemp("component") / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return str(path)


@pytest.fixture(scope="module")
def component(account):
    return Cluster("kubeflow", kubeconfig=account, retry_seconds=30)


def rollout():
    sets = ['rl.rollout.urls=["cluster"]', "resources.rollout.source=/work/base"]
    sets += ["resources.rollout.resources.memory=64Mi"]
    return load_recipe([MINI], overrides=sets).resources.rollout


def test_inference_servers_are_taken_as_they_are_and_torn_down(component, monkeypatch):
    from kubernetes import client

    servers = RolloutServers(component, rollout(), IDENTITY)
    servers.create(image="absent/m1:1")
    servers.create(image="absent/m1:1")  # as a component that starts again
    made = component.apps.read_namespaced_deployment(IDENTITY.name, "kubeflow")
    wanted = rollout_objects.deployment(rollout(), IDENTITY, image="absent/m1:1")
    found = component.api.sanitize_for_serialization(made.spec.template.spec)
    assert_has(found, wanted["spec"]["template"]["spec"])
    deadline = time.monotonic() + 60
    selector = f"{rollout_objects.SELECTOR_LABEL}={IDENTITY.name}"
    pods = []
    while not pods and time.monotonic() < deadline:  # admitted, whether it can start or not
        pods = component.core.list_namespaced_pod("kubeflow", label_selector=selector).items
        time.sleep(0.2)
    assert pods
    # 1.20 has no autoscaling/v2, and nothing of Trainer: no TrainJob is looked for in vain.
    monkeypatch.setattr(component, "scaling", client.AutoscalingV1Api(component.api))
    assert sorted(tear_down(component, "run-1")) == [
        f"Deployment {IDENTITY.name}",
        f"Service {IDENTITY.name}",
    ]
    assert tear_down(component, "run-1") == ()


def assert_has(found, wanted):
    """Every given value is there; the API server adds defaults."""
    if isinstance(wanted, dict):
        for key, value in wanted.items():
            if value != {} or key in found:
                assert key in found, key
                assert_has(found[key], value)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_has(one, other)
    else:
        assert found == wanted


def test_a_component_may_do_nothing_else(component):
    with pytest.raises(ClusterError, match="rights of the service account"):
        component.calling(lambda: component.core.list_namespaced_secret("kubeflow"))
    with pytest.raises(ClusterError, match="rights of the service account"):
        component.calling(lambda: component.apps.list_namespaced_deployment("m1-platform"))


def test_a_sandbox_opens_with_the_rights_of_a_component(platform, account, monkeypatch):
    from kubernetes import client
    from kubernetes.config import kube_config

    platform.cluster.prepare_sandboxes()
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", account)
    check_sandboxes(SandboxCheckConfig())
    left = client.BatchV1Api(platform.api).list_namespaced_job("m1-sandbox").items
    assert left == []  # closed again
