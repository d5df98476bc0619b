"""What the launcher makes in a cluster: pure functions to the objects that are sent."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from m1.config.resource_tables import SecretConfig, StageResources, TrainerConfig
from m1.config.stages import image_digest
from m1.launcher.job import RunLabels
from m1.types import M1Error

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
MANAGER = "m1.launcher/stage"
STAGE_LABEL, RUN_LABEL, NAME_LABEL = "m1/stage", "m1/run", "m1/run-name"
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
HASH_ANNOTATION = "m1/stage-hash"
NODE = "node"
"""Name of the training job and its container in a Trainer runtime."""
FORWARDED = (
    "M1_ROLLOUT_SERVERS",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_RUN_ID",
    "MLFLOW_TRACKING_URI",
)
"""Variables of the component that its processes elsewhere get too; none is a secret."""

_FOR_RANKS = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}  # megatron's overlap of collectives asks for it


@dataclass(frozen=True)
class Identity:
    """What an object belongs to."""

    name: str
    namespace: str
    stage: str
    stage_hash: str
    run: RunLabels
    owner: Sequence[Mapping[str, Any]] = ()


def job_name(stage: str, stage_hash: str) -> str:
    """A name that only this stage of this content has: an RFC 1035 label."""
    return f"m1-{stage.replace('_', '-')}-{stage_hash[:12]}"


def labels_of(identity: Identity) -> dict[str, str]:
    """Labels by which a run's objects are found, and torn down."""
    labels = {STAGE_LABEL: identity.stage}
    for label, value in (
        (RUN_LABEL, identity.run.run_id),
        (NAME_LABEL, identity.run.run_name),
    ):
        if value:
            labels[label] = label_value(value)
    return labels


def label_value(text: str) -> str:
    """A text as Kubernetes takes it for a label: at most 63 of letters, digits, `-`, `_`, `.`."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)[:63].strip("-_.")


def train_job(
    identity: Identity,
    asked: StageResources,
    trainer: TrainerConfig,
    *,
    image: str,
    folder: str,
    num_processes: int,
) -> dict[str, Any]:
    """A TrainJob whose pods run `m1.rank` through torchrun on the job in `folder`.

    The platform's runtime injects PET_* (rendezvous, ranks) and decides about gangs and networks.
    """
    labels = labels_of(identity)
    if trainer.queue:
        labels["kueue.x-k8s.io/queue-name"] = trainer.queue
    if identity.run.priority:
        labels[PRIORITY_LABEL] = identity.run.priority
    spec: dict[str, Any] = {
        "runtimeRef": {
            "apiGroup": GROUP,
            "kind": trainer.runtime_kind,
            "name": trainer.runtime,
        },
        "suspend": trainer.queue is not None,  # Kueue resumes it
        "trainer": {
            "image": image,
            "command": ["torchrun"],
            "args": ["-m", "m1.rank", folder],
            "env": environment(asked, _FOR_RANKS | {"M1_IMAGE_DIGEST": image_digest()}),
            "numNodes": asked.num_nodes,
            "numProcPerNode": num_processes // asked.num_nodes,
            "resourcesPerNode": amounts(asked),
        },
        "runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": _patch(asked, labels)}],
    }
    if asked.timeout_seconds is not None:
        spec["activeDeadlineSeconds"] = asked.timeout_seconds
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "name": identity.name,
            "namespace": identity.namespace,
            "labels": labels,
            "annotations": {HASH_ANNOTATION: identity.stage_hash},
            "ownerReferences": [dict(owner) for owner in identity.owner],
        },
        "spec": spec,
    }


def environment(asked: StageResources, further: Mapping[str, str]) -> list[dict[str, Any]]:
    """Variables of a container: forwarded, given, and from secrets by reference.

    Raises:
        M1Error: What would be forwarded holds a secret.
    """
    passed = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    if "@" in urlsplit(passed.get("MLFLOW_TRACKING_URI", "")).netloc:
        raise M1Error(
            "MLFLOW_TRACKING_URI holds credentials, which would stand in the cluster's objects; "
            "give them by MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD from a secret "
            "(resources.<stage>.secrets)"
        )
    plain = {**passed, **further, **asked.environment}
    variables: list[dict[str, Any]] = [{"name": n, "value": v} for n, v in sorted(plain.items())]
    return variables + [entry for secret in asked.secrets for entry in _from_secret(secret)]


def _from_secret(secret: SecretConfig) -> list[dict[str, Any]]:
    return [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": secret.name, "key": key}}}
        for key, name in secret.environment.items()
    ]


def amounts(asked: StageResources) -> dict[str, Any]:
    """Requests, equal to limits, so that no neighbour can take what a rank waits for."""
    found: dict[str, str] = {}
    if asked.cpu:
        found["cpu"] = asked.cpu
    if asked.memory:
        found["memory"] = asked.memory
    if asked.num_accelerators:
        found[asked.accelerator] = str(asked.num_accelerators)
    return {"requests": dict(found), "limits": dict(found)} if found else {}


def placement(asked: StageResources) -> dict[str, Any]:
    """Node selector, tolerations and volumes of a pod."""
    spec: dict[str, Any] = {}
    if asked.node_selector:
        spec["nodeSelector"] = dict(asked.node_selector)
    if asked.tolerations:
        spec["tolerations"] = [
            t.model_dump(exclude_none=True, include={"key", "operator", "value", "effect"})
            for t in asked.tolerations
        ]
    claims = dict.fromkeys(volume.claim for volume in asked.volumes)
    volumes: list[dict[str, Any]] = [
        {"name": _volume_name(claim), "persistentVolumeClaim": {"claimName": claim}}
        for claim in claims
    ]
    if asked.shared_memory:
        memory = {"medium": "Memory", "sizeLimit": asked.shared_memory}
        volumes.append({"name": "shm", "emptyDir": memory})
    if volumes:
        spec["volumes"] = volumes
    return spec


def mounts(asked: StageResources) -> list[dict[str, Any]]:
    """Volume mounts of a container."""
    found: list[dict[str, Any]] = []
    for volume in asked.volumes:
        mount = {"name": _volume_name(volume.claim), "mountPath": volume.path}
        found.append(mount | ({"subPath": volume.sub_path} if volume.sub_path else {}))
    if asked.shared_memory:
        found.append({"name": "shm", "mountPath": "/dev/shm"})
    return found


def _volume_name(claim: str) -> str:
    return "claim-" + claim.replace(".", "-")[:57].rstrip("-")


def _patch(asked: StageResources, labels: Mapping[str, str]) -> dict[str, Any]:
    """The runtime's pods with our labels, places and volumes."""
    pod = placement(asked)
    if mounts(asked):
        pod["containers"] = [{"name": NODE, "volumeMounts": mounts(asked)}]
    own = {name: value for name, value in labels.items() if name.startswith("m1/")}
    template: dict[str, Any] = {"metadata": {"labels": own}}
    if pod:
        template["spec"] = pod
    job = {"name": NODE, "template": {"spec": {"template": template}}}
    return {"template": {"spec": {"replicatedJobs": [job]}}}
