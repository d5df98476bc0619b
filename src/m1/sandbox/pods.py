"""What a sandbox looks like to Kubernetes: pure functions to the objects that are sent."""

import secrets
from dataclasses import dataclass
from typing import Any

from m1.sandbox.base import WORK, Limits

KIND_LABEL = "m1.sandbox/kind"
FARM_LABEL = "m1.sandbox/farm"
POLICY_NAME = "m1-sandbox-no-network"
_USERS = range(200_000, 2_000_000_000)
_KEEP_ALIVE = "while :; do sleep 3600 & wait; done"
"""The first process: a shell, because `wait` also collects orphans of killed commands."""


@dataclass(frozen=True)
class ClusterConfig:
    """Where and how sandboxes run in a cluster."""

    namespace: str = "m1-sandbox"
    """A namespace of nothing else; manifests/base/sandbox makes it."""
    image: str = "localhost/python:1"
    """For environments that name none: sh, coreutils, tar, python3."""
    image_pull_policy: str = "IfNotPresent"
    runtime_class: str | None = None
    """RuntimeClass of gVisor or Kata; None shares the node's kernel."""
    queue: str | None = None
    """LocalQueue of Kueue."""
    cpu: str = "1"
    """Processors of a sandbox, as Kubernetes writes them."""
    cpu_request: str = "100m"
    lease_seconds: float = 900.0
    """Sandboxes that nobody renews for so long end by themselves."""
    start_seconds: float = 120.0
    """Time from the request to a running container."""
    retry_seconds: float = 30.0
    """How long an unreachable API server is asked again."""
    farm: str = "default"
    """Label by which `collect_garbage` knows its own."""
    kubeconfig: str | None = None
    """File; None takes KUBECONFIG, ~/.kube/config or the pod's own account."""
    context: str | None = None


def new_name() -> str:
    """A name no other sandbox has."""
    return f"m1-sandbox-{secrets.token_hex(6)}"


def labels_of(config: ClusterConfig, name: str) -> dict[str, str]:
    """Labels of a sandbox's objects."""
    labels = {KIND_LABEL: "sandbox", FARM_LABEL: config.farm, "m1.sandbox/name": name}
    if config.queue:
        labels["kueue.x-k8s.io/queue-name"] = config.queue
    return labels


def pod_template(config: ClusterConfig, name: str, *, image: str, limits: Limits) -> dict[str, Any]:
    """Metadata and spec of a pod that can do nothing but compute.

    The user is drawn at random, so that the bound on a user's processes counts this pod's only.
    """
    user = _USERS[secrets.randbelow(len(_USERS))]
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 0,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "hostname": "sandbox",
        "dnsPolicy": "None",
        "dnsConfig": {"nameservers": ["127.0.0.1"]},
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": user,
            "runAsGroup": user,
            "fsGroup": user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": [
            {
                "name": "scratch",
                "emptyDir": {"medium": "Memory", "sizeLimit": f"{limits.scratch_mib}Mi"},
            }
        ],
        "containers": [_container(config, image, limits)],
    }
    if config.runtime_class:
        spec["runtimeClassName"] = config.runtime_class
    return {"metadata": {"labels": labels_of(config, name)}, "spec": spec}


def job(config: ClusterConfig, name: str, *, image: str, limits: Limits) -> dict[str, Any]:
    """A Job of one sandbox: the cluster itself ends and deletes it after the lease."""
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": labels_of(config, name)},
        "spec": {
            "backoffLimit": 0,
            "completions": 1,
            "parallelism": 1,
            "activeDeadlineSeconds": int(-(-config.lease_seconds // 1)),
            "ttlSecondsAfterFinished": 0,
            "template": pod_template(config, name, image=image, limits=limits),
        },
    }


def network_policy(namespace: str) -> dict[str, Any]:
    """No packet in or out of any pod of the namespace, DNS included."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": POLICY_NAME, "namespace": namespace},
        "spec": {
            "podSelector": {},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [],
            "egress": [],
        },
    }


def _container(config: ClusterConfig, image: str, limits: Limits) -> dict[str, Any]:
    memory = f"{limits.memory_mib}Mi"
    return {
        "name": "sandbox",
        "image": image,
        "imagePullPolicy": config.image_pull_policy,
        "command": ["sh", "-c", _KEEP_ALIVE],
        "workingDir": WORK,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "resources": {
            "requests": {"cpu": config.cpu_request, "memory": memory},
            "limits": {"cpu": config.cpu, "memory": memory},
        },
        "volumeMounts": [
            {"name": "scratch", "mountPath": WORK, "subPath": "work"},
            {"name": "scratch", "mountPath": "/tmp", "subPath": "tmp"},
        ],
    }
