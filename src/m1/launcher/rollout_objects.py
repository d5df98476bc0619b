"""The rl stage's inference servers as Kubernetes objects: pure functions."""

import math
from typing import Any

from m1.config.resource_tables import RolloutDeploymentConfig
from m1.launcher.objects import (
    Identity,
    amounts,
    environment,
    labels_of,
    mounts,
    placement,
)

SELECTOR_LABEL = "m1/rollout"
METRIC = "m1_pending_completions"
_USER = 65532
_DRAIN_SECONDS = 90
"""Longer than `m1 serve` lets open requests finish after SIGTERM."""


def deployment(
    config: RolloutDeploymentConfig, identity: Identity, *, image: str
) -> dict[str, Any]:
    """`m1 serve` in `min_replicas` pods; an autoscaler may make more.

    The pods meet the restricted Pod Security Standard, as those of manifests/base/rollout do.
    """
    pod = placement(config.resources) | {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": _DRAIN_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(config, image)],
    }
    pod["volumes"] = [*pod.get("volumes", ()), {"name": "tmp", "emptyDir": {}}]
    if identity.run.priority:
        pod["priorityClassName"] = identity.run.priority
    labels = labels_of(identity) | {SELECTOR_LABEL: identity.name}
    annotations = {"prometheus.io/scrape": "true", "prometheus.io/port": str(config.port)}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(identity, labels),
        "spec": {
            "replicas": config.min_replicas,
            "selector": {"matchLabels": {SELECTOR_LABEL: identity.name}},
            "template": {"metadata": {"labels": labels, "annotations": annotations}, "spec": pod},
        },
    }


def service(config: RolloutDeploymentConfig, identity: Identity) -> dict[str, Any]:
    """A headless Service: its name resolves to every ready server, as each needs the weights."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(identity, labels_of(identity)),
        "spec": {
            "clusterIP": "None",
            "selector": {SELECTOR_LABEL: identity.name},
            "ports": [{"name": "http", "port": config.port, "targetPort": config.port}],
        },
    }


def autoscaler(config: RolloutDeploymentConfig, identity: Identity) -> dict[str, Any]:
    """Between the bounds by waiting and running completions of a server.

    The metric reaches Kubernetes through an adapter of the platform (custom.metrics.k8s.io).
    """
    metric = {
        "type": "Pods",
        "pods": {
            "metric": {"name": METRIC},
            "target": {"type": "AverageValue", "averageValue": str(config.queue_target)},
        },
    }
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": _metadata(identity, labels_of(identity)),
        "spec": {
            "scaleTargetRef": {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "name": identity.name,
            },
            "minReplicas": config.min_replicas,
            "maxReplicas": config.max_replicas,
            "metrics": [metric],
        },
    }


def _metadata(identity: Identity, labels: dict[str, str]) -> dict[str, Any]:
    return {
        "name": identity.name,
        "namespace": identity.namespace,
        "labels": labels,
        "ownerReferences": [dict(owner) for owner in identity.owner],
    }


def _container(config: RolloutDeploymentConfig, image: str) -> dict[str, Any]:
    arguments = ["serve", config.source, "--host", "0.0.0.0", "--port", str(config.port)]
    probe = {
        "httpGet": {"path": "/health", "port": "http"},
        "periodSeconds": 5,
        "timeoutSeconds": 5,
    }
    return {
        "name": "serve",
        "image": image,
        "command": ["m1"],
        "args": [*arguments, *config.options],
        "env": environment(config.resources, {"HOME": "/tmp"}),
        "ports": [{"name": "http", "containerPort": config.port}],
        # Until the weights are loaded; after so long the stage has given up.
        "startupProbe": {**probe, "failureThreshold": math.ceil(config.start_seconds / 5)},
        "readinessProbe": probe,
        # /health fails when the engine has, not when it is busy.
        "livenessProbe": {
            **probe,
            "periodSeconds": 20,
            "failureThreshold": 6,
        },
        "resources": amounts(config.resources),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [*mounts(config.resources), {"name": "tmp", "mountPath": "/tmp"}],
    }
