"""The same tests for every backend; those in a cluster are marked so."""

import pytest
from agent_sandbox_controller import SandboxController
from one_node_cluster import OneNodeCluster, missing
from published_schemas import FOLDERS, schema_of
from sandbox_limits import LIMITS

from m1.sandbox import bubblewrap
from m1.sandbox.agent_sandbox import AgentSandboxBackend
from m1.sandbox.base import Environment
from m1.sandbox.farm.metrics import FarmMetrics
from m1.sandbox.farm.warm import WarmPool
from m1.sandbox.kubernetes import KubernetesBackend
from m1.sandbox.local import BubblewrapBackend
from m1.sandbox.pods import ClusterConfig

BACKENDS = [
    "bubblewrap",
    pytest.param("kubernetes", marks=pytest.mark.cluster),
    pytest.param("agent-sandbox", marks=pytest.mark.cluster),
]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """agent-sandbox's pods are built as those of the other backend, so most of theirs can wait."""
    for item in items:
        is_first = item.name.startswith(("test_input_output", "test_four_sandboxes"))
        if "agent-sandbox" in item.name and not is_first:
            item.add_marker(pytest.mark.exhaustive)


@pytest.fixture(scope="session")
def cluster():
    if missing():
        pytest.skip(missing())
    running = OneNodeCluster()
    try:
        running.prepare_sandboxes()
        yield running
    finally:
        running.close()


@pytest.fixture(scope="session")
def cluster_config(cluster):
    return ClusterConfig(kubeconfig=cluster.kubeconfig, cpu_request="10m", lease_seconds=300)


@pytest.fixture(scope="session")
def kubernetes_backend(cluster_config):
    return KubernetesBackend(cluster_config)


@pytest.fixture(scope="session")
def agent_sandbox_backend(cluster_config):
    if schema_of("agents.x-k8s.io/v1beta1", "Sandbox") is None:
        pytest.skip(f"no published schema of a Sandbox in {FOLDERS} (M1_CRDS)")
    backend = AgentSandboxBackend(cluster_config)
    controller = SandboxController(backend)
    yield backend
    controller.close()


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    if request.param == "bubblewrap":
        if bubblewrap.failure() is not None:
            pytest.skip(f"no sandbox here: {bubblewrap.failure()}")
        return BubblewrapBackend()
    return request.getfixturevalue(f"{request.param.replace('-', '_')}_backend")


@pytest.fixture(scope="module")
def ahead(backend):
    """Pods take a second to start: a few are opened while other tests run."""
    size = 0 if backend.name == "bubblewrap" else 3
    pool = WarmPool(backend, FarmMetrics(backend.name), size=size, max_environments=1)
    yield pool
    pool.close()


@pytest.fixture
def sandbox(backend, ahead):
    opened = ahead.take(Environment(), LIMITS) or backend.open(limits=LIMITS)
    with opened:
        yield opened
