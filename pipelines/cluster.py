"""What a recipe's `[resources]` add to a task: KFP's platform specification."""

import json
from typing import Any

from kfp import dsl
from kfp import kubernetes as k8s

from m1.config.resource_tables import StageResources
from m1.config.schema import Recipe, ResourcesConfig
from m1.launch import PLACES_VARIABLE
from m1.resolving import places_json

_LAUNCHER = {"cpu": "500m", "memory": "1Gi"}
"""What a component needs that only follows a TrainJob."""


def equip(task: Any, kind: str, recipe: Recipe) -> Any:
    """Give a stage's task its image and what it asks of the cluster."""
    resources = recipe.resources
    asked = resources.of(kind)
    if resources.launcher(kind) == "trainjob":
        # Accelerators, nodes and the time limit are the TrainJob's.
        asked = asked.model_copy(
            update={
                **_LAUNCHER,
                "num_accelerators": 0,
                "shared_memory": None,
                "node_selector": {},
                "tolerations": (),
                "timeout_seconds": None,
            }
        )
    task.set_container_image(recipe.image)
    _amounts(task, asked)
    _placement(task, asked)
    _attempts(task, asked)
    places = places_json(recipe)
    if places != "{}":
        task.set_env_variable(PLACES_VARIABLE, places)
    for name, value in asked.environment.items():
        task.set_env_variable(name, value)
    return task


def pipeline_config(resources: ResourcesConfig) -> dsl.PipelineConfig:
    """Time limits of the whole run."""
    return dsl.PipelineConfig(
        ttl_seconds_after_finished=resources.ttl_seconds,
        active_deadline_seconds=resources.deadline_seconds,
    )


def _amounts(task: Any, asked: StageResources) -> None:
    if asked.cpu:
        task.set_cpu_request(asked.cpu).set_cpu_limit(asked.cpu)
    if asked.memory:
        task.set_memory_request(asked.memory).set_memory_limit(asked.memory)
    if asked.num_accelerators:
        task.set_accelerator_type(asked.accelerator)
        task.set_accelerator_limit(asked.num_accelerators)
    if asked.shared_memory:
        k8s.empty_dir_mount(
            task,
            volume_name="shm",
            mount_path="/dev/shm",
            medium="Memory",
            size_limit=asked.shared_memory,
        )


def _placement(task: Any, asked: StageResources) -> None:
    for key, value in asked.node_selector.items():
        k8s.add_node_selector(task, key, value)
    for taint in asked.tolerations:
        k8s.add_toleration(
            task, key=taint.key, operator=taint.operator, value=taint.value, effect=taint.effect
        )
    for volume in asked.volumes:
        k8s.mount_pvc(
            task, pvc_name=volume.claim, mount_path=volume.path, sub_path=volume.sub_path or ""
        )
    for secret in asked.secrets:
        k8s.use_secret_as_env(task, secret.name, dict(secret.environment))


def _attempts(task: Any, asked: StageResources) -> None:
    if asked.timeout_seconds is not None:
        k8s.set_timeout(task, asked.timeout_seconds)
    if asked.retries:
        task.set_retry(
            asked.retries,
            backoff_duration=f"{asked.retry_backoff_seconds}s",
            backoff_factor=asked.retry_backoff_factor,
            backoff_max_duration=f"{asked.retry_backoff_max_seconds}s",
        )
    if asked.cache_key is not None and asked.cache:
        task.set_caching_options(True, cache_key=asked.cache_key)
    elif not asked.cache:
        task.set_caching_options(False)


def fixed_json(fixed: Any) -> str:
    """One text for one value."""
    return json.dumps(fixed.model_dump(mode="json"), sort_keys=True)
