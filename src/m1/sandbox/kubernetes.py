"""A Job for each sandbox, which is its lease.

The Job's deadline ends the pod and its time to live deletes it, without anyone of ours alive;
`renew` moves the deadline.
"""

import time
from typing import Any

from m1.sandbox import pods
from m1.sandbox.base import Limits
from m1.sandbox.pods import ClusterConfig
from m1.sandbox.podsandbox import PodBackend


class KubernetesBackend(PodBackend):
    """A Job for each sandbox; see `base.Backend`."""

    name = "kubernetes"

    def __init__(self, config: ClusterConfig | None = None, *, is_strict: bool = True) -> None:
        super().__init__(config, is_strict=is_strict)
        from kubernetes import client

        self._batch = client.BatchV1Api(self.api)

    def _create(self, name: str, image: str, limits: Limits) -> None:
        from kubernetes.client import ApiException

        body = pods.job(self.config, name, image=image, limits=limits)
        try:
            self._batch.create_namespaced_job(self.config.namespace, body)
        except ApiException as error:
            if error.status != 409:  # made by an attempt whose answer was lost
                raise

    def renew(self, name: str, seconds: float) -> None:
        """Move the Job's deadline, which counts from its start."""
        job: Any = self.calling(lambda: self._read(name))
        begun = job.status.start_time or job.metadata.creation_timestamp
        deadline = int(time.time() - begun.timestamp() + seconds) + 1
        body = {"spec": {"activeDeadlineSeconds": deadline}}
        self.calling(lambda: self._batch.patch_namespaced_job(name, self.config.namespace, body))

    def _read(self, name: str) -> Any:
        return self._batch.read_namespaced_job(name, self.config.namespace)

    def remove(self, name: str) -> None:
        """Delete the Job, and with it the pod."""
        self.calling(
            lambda: self._batch.delete_namespaced_job(
                name, self.config.namespace, propagation_policy="Background"
            ),
            is_missing_ok=True,
        )

    def collect_garbage(self) -> int:
        """Delete Jobs of this farm that ended or are past their deadline; how many.

        The cluster does so itself where its controllers are in order.
        """
        selector = f"{pods.KIND_LABEL}=sandbox,{pods.FARM_LABEL}={self.config.farm}"
        found = self.calling(
            lambda: self._batch.list_namespaced_job(self.config.namespace, label_selector=selector)
        )
        late = [job for job in (found.items if found else []) if _is_over(job)]
        for job in late:
            self.remove(job.metadata.name)
        return len(late)


def _is_over(job: Any) -> bool:
    ended = job.status.succeeded or job.status.failed
    begun = job.status.start_time or job.metadata.creation_timestamp
    is_late = time.time() > begun.timestamp() + (job.spec.active_deadline_seconds or 0)
    return bool(ended or is_late)
