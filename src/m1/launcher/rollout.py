"""What surrounds stages in a cluster: the rl stage's inference servers, a look at the sandboxes.

Servers are made before the stage and taken down after it, whatever happens; a run's exit handler
(`teardown`) deletes what a killed component left.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from m1.config.resource_tables import RolloutDeploymentConfig, SandboxCheckConfig
from m1.config.schema import Recipe
from m1.config.stages import stage_hashes
from m1.launcher import rollout_objects
from m1.launcher.cluster import Cluster, ClusterError
from m1.launcher.job import RunLabels
from m1.launcher.objects import Identity
from m1.types import M1Error

_POLL_SECONDS = 2.0


@contextlib.contextmanager
def surroundings(
    stage: str,
    recipe: Recipe,
    cluster: Cluster,
    *,
    run: RunLabels,
    say: Callable[[str], Any] = print,
) -> Iterator[str | None]:
    """Servers of an rl stage, ready; their address, or None without any.

    Raises:
        M1Error: They are not ready in time.
    """
    resources = recipe.resources
    if resources.rollout is None:
        yield None
        return
    stage_hash = stage_hashes(recipe)[stage]
    identity = Identity(
        name=service_name(stage, stage_hash),
        namespace=cluster.namespace,
        stage=stage,
        stage_hash=stage_hash,
        run=run,
        owner=cluster.owner(),
    )
    servers = RolloutServers(cluster, resources.rollout, identity)
    try:
        servers.create(image=recipe.image)
        servers.wait_until_ready()
        say(f"{resources.rollout.min_replicas} inference servers are ready at {identity.name}")
        yield address(resources.rollout, identity.name, cluster.namespace)
    finally:
        servers.delete()


def service_name(stage: str, stage_hash: str) -> str:
    """Name of a stage's Deployment, Service and autoscaler."""
    return f"m1-serve-{stage.replace('_', '-')}-{stage_hash[:12]}"


def address(config: RolloutDeploymentConfig, name: str, namespace: str) -> str:
    """What SERVERS_VARIABLE says: a name that resolves to every server."""
    return f"dns+http://{name}.{namespace}.svc:{config.port}"


def check_sandboxes(config: SandboxCheckConfig) -> None:
    """Open one sandbox as the stage would, and run a program in it.

    Raises:
        M1Error: The namespace does not isolate, or no sandbox opens there.
    """
    from m1.sandbox.base import SandboxError
    from m1.sandbox.kubernetes import KubernetesBackend
    from m1.sandbox.pods import ClusterConfig

    where = ClusterConfig(
        namespace=config.namespace, image=config.image, runtime_class=config.runtime_class
    )
    try:
        with KubernetesBackend(where).open() as sandbox:
            done = sandbox.exec(["true"])
    except SandboxError as error:
        raise M1Error(
            f"no sandbox opens in namespace {config.namespace} (resources.sandboxes): {error}"
        ) from error
    if done.exit_code != 0:
        raise M1Error(
            f"a sandbox in namespace {config.namespace} ends `true` with {done.exit_code}: "
            f"{done.stderr[-300:]!r}; look at its image {config.image}"
        )


class RolloutServers:
    """A Deployment of inference servers with its Service and autoscaler."""

    def __init__(
        self, cluster: Cluster, config: RolloutDeploymentConfig, identity: Identity
    ) -> None:
        self._cluster, self._config, self._identity = cluster, config, identity

    def create(self, *, image: str) -> None:
        """Make what is not there yet: a component that starts again finds its own."""
        config, identity, space = self._config, self._identity, self._cluster.namespace
        cluster = self._cluster
        made = rollout_objects.deployment(config, identity, image=image)
        self._make(lambda: cluster.apps.create_namespaced_deployment(space, made))
        headless = rollout_objects.service(config, identity)
        self._make(lambda: cluster.core.create_namespaced_service(space, headless))
        if config.max_replicas > config.min_replicas:
            scaler = rollout_objects.autoscaler(config, identity)
            create = cluster.scaling.create_namespaced_horizontal_pod_autoscaler
            self._make(lambda: create(space, scaler))

    def wait_until_ready(self) -> None:
        """Return when `min_replicas` servers answer their health checks.

        Raises:
            M1Error: They do not within `start_seconds`.
        """
        name, space = self._identity.name, self._cluster.namespace
        deadline = time.monotonic() + self._config.start_seconds
        while True:
            found: Any = self._cluster.calling(
                lambda: self._cluster.apps.read_namespaced_deployment(name, space)
            )
            ready = found.status.ready_replicas or 0
            if ready >= self._config.min_replicas:
                return
            if time.monotonic() > deadline:
                raise M1Error(
                    f"{ready} of {self._config.min_replicas} inference servers of {name} were "
                    f"ready within {self._config.start_seconds:g} seconds "
                    f"(resources.rollout.start_seconds); see kubectl -n {space} describe deployment"
                )
            time.sleep(_POLL_SECONDS)

    def delete(self) -> None:
        """Delete all three; fine if they are gone."""
        name, space, cluster = self._identity.name, self._cluster.namespace, self._cluster
        for delete in (
            cluster.scaling.delete_namespaced_horizontal_pod_autoscaler,
            cluster.apps.delete_namespaced_deployment,
            cluster.core.delete_namespaced_service,
        ):
            cluster.calling(lambda d=delete: d(name, space), is_missing_ok=True)  # type: ignore[misc]

    def _make(self, create: Callable[[], Any]) -> None:
        from kubernetes.client import ApiException

        try:
            self._cluster.calling(create)
        except ClusterError as error:
            cause = error.__cause__
            if not (isinstance(cause, ApiException) and cause.status == 409):
                raise
