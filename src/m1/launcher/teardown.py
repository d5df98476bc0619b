"""Everything that a run made in a cluster, deleted: what its exit handler calls."""

from typing import Any

from m1.launcher import objects
from m1.launcher.cluster import Cluster


def tear_down(cluster: Cluster, run_id: str) -> tuple[str, ...]:
    """Delete TrainJobs, autoscalers, Deployments and Services of a run.

    Returns:
        Kind and name of each.

    Raises:
        ClusterError: The API server refused, or stayed away.
    """
    if not run_id:
        return ()
    space, selector = cluster.namespace, f"{objects.RUN_LABEL}={objects.label_value(run_id)}"
    place = (objects.GROUP, objects.VERSION, space, objects.PLURAL)
    custom = cluster.objects
    jobs: Any = cluster.calling(
        lambda: custom.list_namespaced_custom_object(*place, label_selector=selector),
        is_missing_ok=True,  # a cluster without Trainer
    )
    deleted = []
    for job in jobs["items"] if jobs is not None else ():
        name = job["metadata"]["name"]
        cluster.calling(
            lambda name=name: custom.delete_namespaced_custom_object(  # type: ignore[misc]
                *place, name, propagation_policy="Foreground"
            ),
            is_missing_ok=True,
        )
        deleted.append(f"TrainJob {name}")
    for kind, list_them, delete in (
        (
            "HorizontalPodAutoscaler",
            cluster.scaling.list_namespaced_horizontal_pod_autoscaler,
            cluster.scaling.delete_namespaced_horizontal_pod_autoscaler,
        ),
        (
            "Deployment",
            cluster.apps.list_namespaced_deployment,
            cluster.apps.delete_namespaced_deployment,
        ),
        (
            "Service",
            cluster.core.list_namespaced_service,
            cluster.core.delete_namespaced_service,
        ),
    ):
        found: Any = cluster.calling(lambda f=list_them: f(space, label_selector=selector))  # type: ignore[misc]
        for item in found.items:
            name = item.metadata.name
            cluster.calling(
                lambda f=delete, n=name: f(n, space),  # type: ignore[misc]
                is_missing_ok=True,
            )
            deleted.append(f"{kind} {name}")
    return tuple(deleted)
