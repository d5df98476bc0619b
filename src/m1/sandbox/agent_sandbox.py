"""Sandboxes as `Sandbox` objects of kubernetes-sigs/agent-sandbox (agents.x-k8s.io/v1beta1).

Its controller makes the pod, and deletes it at `shutdownTime`, which is the lease. Found by label,
the pod may also be one that the controller took from a warm pool.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

from m1.sandbox import pods
from m1.sandbox.base import Limits
from m1.sandbox.pods import ClusterConfig
from m1.sandbox.podsandbox import PodBackend

GROUP, VERSION, PLURAL = "agents.x-k8s.io", "v1beta1", "sandboxes"


class AgentSandboxBackend(PodBackend):
    """A `Sandbox` object for each sandbox; see `base.Backend`."""

    name = "agent-sandbox"

    def __init__(self, config: ClusterConfig | None = None, *, is_strict: bool = True) -> None:
        super().__init__(config, is_strict=is_strict)
        from kubernetes import client

        self._objects = client.CustomObjectsApi(self.api)
        self._place = (GROUP, VERSION, self.config.namespace, PLURAL)

    def _create(self, name: str, image: str, limits: Limits) -> None:
        from kubernetes.client import ApiException

        body = sandbox_object(self.config, name, image=image, limits=limits)
        try:
            self._objects.create_namespaced_custom_object(*self._place, body)
        except ApiException as error:
            if error.status != 409:  # made by an attempt whose answer was lost
                raise

    def renew(self, name: str, seconds: float) -> None:
        """Move the time at which the controller deletes the sandbox."""
        body = {"spec": {"shutdownTime": _in(seconds)}}
        self.calling(lambda: self._objects.patch_namespaced_custom_object(*self._place, name, body))

    def _read(self, name: str) -> Any:
        return self._objects.get_namespaced_custom_object(*self._place, name)

    def remove(self, name: str) -> None:
        """Delete the object, and with it the pod."""
        self.calling(
            lambda: self._objects.delete_namespaced_custom_object(*self._place, name),
            is_missing_ok=True,
        )

    def collect_garbage(self) -> int:
        """Delete sandboxes of this farm that are past their time; how many."""
        selector = f"{pods.KIND_LABEL}=sandbox,{pods.FARM_LABEL}={self.config.farm}"
        found: Any = self.calling(
            lambda: self._objects.list_namespaced_custom_object(
                *self._place, label_selector=selector
            )
        )
        now = _in(0)
        late = [item for item in found["items"] if item["spec"].get("shutdownTime", now) < now]
        for item in late:
            self.remove(item["metadata"]["name"])
        return len(late)


def sandbox_object(
    config: ClusterConfig, name: str, *, image: str, limits: Limits
) -> dict[str, Any]:
    """The object that is sent."""
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "Sandbox",
        "metadata": {"name": name, "labels": pods.labels_of(config, name)},
        "spec": {
            "shutdownTime": _in(config.lease_seconds),
            "shutdownPolicy": "Delete",
            "podTemplate": pods.pod_template(config, name, image=image, limits=limits),
        },
    }


def _in(seconds: float) -> str:
    """RFC 3339, in UTC and whole seconds, so that texts compare as times do."""
    moment = datetime.now(UTC) + timedelta(seconds=seconds)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
