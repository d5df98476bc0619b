"""The rl stage's inference servers as Kubernetes objects: pure functions."""

from typing import Any

from m1.config.resource_tables import RolloutDeploymentConfig
from m1.launcher.objects import (
    PRIORITY_LABEL,
    Identity,
    amounts,
    environment,
    labels_of,
    mounts,
    placement,
)

SELECTOR_LABEL = "m1/rollout"
METRIC = "m1_pending_completions"


def deployment(
    config: RolloutDeploymentConfig, identity: Identity, *, image: str
) -> dict[str, Any]:
    """`m1 serve` in `min_replicas` pods; an autoscaler may make more."""
    pod = placement(config.resources)
    pod["containers"] = [_container(config, image)]
    labels = labels_of(identity) | {SELECTOR_LABEL: identity.name}
    own = labels | ({PRIORITY_LABEL: identity.run.priority} if identity.run.priority else {})
    annotations = {"prometheus.io/scrape": "true", "prometheus.io/port": str(config.port)}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(identity, own),
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
    probe = {"httpGet": {"path": "/health", "port": config.port}, "periodSeconds": 5}
    container: dict[str, Any] = {
        "name": "serve",
        "image": image,
        "command": ["m1"],
        "args": [*arguments, *config.options],
        "env": environment(config.resources, {}),
        "ports": [{"name": "http", "containerPort": config.port}],
        "readinessProbe": probe,
        # A server that loads weights answers late, not never.
        "livenessProbe": {**probe, "initialDelaySeconds": 600, "failureThreshold": 24},
        "resources": amounts(config.resources),
    }
    if mounts(config.resources):
        container["volumeMounts"] = mounts(config.resources)
    return container
