"""The Kubernetes API as launchers use it: retried while it is away, errors in our words."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tenacity

from m1.sandbox.base import SandboxError
from m1.sandbox.pods import ClusterConfig
from m1.sandbox.podsandbox import load_configuration
from m1.types import M1Error

_T = TypeVar("_T")
_PASSING = (0, 429, 500, 502, 503, 504)
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
OWNER_KIND = "Workflow"


class ClusterError(M1Error):
    """The API server refused, or stayed out of reach."""


class Cluster:
    """A connection to one namespace."""

    def __init__(
        self,
        namespace: str | None = None,
        *,
        retry_seconds: float = 300.0,
        kubeconfig: str | None = None,
    ) -> None:
        """Connect.

        Args:
            namespace: Where objects are made; None takes the pod's own, or `default`.
            retry_seconds: How long an unreachable API server is asked again.
            kubeconfig: File; None takes the pod's own account, KUBECONFIG or ~/.kube/config.

        Raises:
            ClusterError: No cluster is configured.
        """
        try:
            self.configuration = load_configuration(ClusterConfig(kubeconfig=kubeconfig))
        except SandboxError as error:
            raise ClusterError(str(error)) from error
        from kubernetes import client

        self.namespace = namespace or own_namespace()
        self.api = client.ApiClient(self.configuration)
        self.core = client.CoreV1Api(self.api)
        self.apps = client.AppsV1Api(self.api)
        self.scaling = client.AutoscalingV2Api(self.api)
        self.objects = client.CustomObjectsApi(self.api)
        self._retry_seconds = retry_seconds

    def calling(self, call: Callable[[], _T], *, is_missing_ok: bool = False) -> _T | None:
        """The answer, asked for again while the server is out of reach; None for 404 where fine.

        Raises:
            ClusterError: It refused, or stayed away.
        """
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        def is_passing(error: BaseException) -> bool:
            busy = isinstance(error, ApiException) and error.status in _PASSING
            return busy or isinstance(error, HTTPError)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_passing),
            stop=tenacity.stop_after_delay(self._retry_seconds),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
            reraise=True,
        )
        try:
            return retrying(call)
        except ApiException as error:
            if error.status == 404 and is_missing_ok:
                return None
            raise ClusterError(
                f"the cluster refused in namespace {self.namespace} ({error.status} "
                f"{error.reason}): {error.body}; look at the rights of the service account"
                if error.status in (401, 403)
                else f"the cluster refused ({error.status} {error.reason}): {error.body}"
            ) from error
        except HTTPError as error:
            raise ClusterError(
                f"the API server is out of reach since {self._retry_seconds:g} seconds: {error}"
            ) from error

    def owner(self) -> list[dict[str, Any]]:
        """Owner references that delete what is made here with the KFP run's workflow.

        Empty outside KFP: a pod of a run is told its name in KFP_POD_NAME.
        """
        name = os.environ.get("KFP_POD_NAME")
        if not name or self.namespace != own_namespace():  # owners live in the same namespace
            return []
        pod: Any = self.calling(
            lambda: self.core.read_namespaced_pod(name, self.namespace), is_missing_ok=True
        )
        found = pod.metadata.owner_references if pod is not None else None
        return [
            {"apiVersion": o.api_version, "kind": o.kind, "name": o.name, "uid": o.uid}
            for o in found or []
            if o.kind == OWNER_KIND
        ]


def own_namespace() -> str:
    """Namespace of this pod; `default` outside a cluster."""
    if _NAMESPACE_FILE.exists():
        return _NAMESPACE_FILE.read_text().strip()
    return os.environ.get("M1_NAMESPACE", "default")


def is_inside() -> bool:
    """Whether this process is in a pod of a cluster."""
    return "KUBERNETES_SERVICE_HOST" in os.environ
