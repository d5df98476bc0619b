"""A stage of several nodes: a TrainJob of Kubeflow Trainer, made, followed and ended.

The job's name is made of the stage and its hash, so a component that starts again finds the job it
had made and goes on following it. Only an end that was seen counts: a job that failed before is
deleted and made anew, and the stage goes on from its checkpoint.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from m1.config.stages import stage_hashes, stage_kind
from m1.launcher import objects
from m1.launcher.cluster import Cluster, ClusterError
from m1.launcher.job import RunLabels, StageJob
from m1.launcher.logs import LogStream, last_words, pods_of
from m1.launcher.progress import ProgressLines
from m1.types import M1Error, Pointer

_DELETE_SECONDS = 300.0
_GRACE_SECONDS = 120.0
"""Beyond its deadline after which a job that nobody ended is ended from here."""


class Cancelled(BaseException):
    """The run was cancelled: KFP ended the component's pod."""


class TrainJobLauncher:
    """Pods of a cluster; see `m1.launcher.job.Launcher`."""

    def __init__(
        self, cluster: Cluster, *, run: RunLabels, say: Callable[[str], Any] = print
    ) -> None:
        self._cluster, self._run, self._say = cluster, run, say

    def run(self, job: StageJob) -> Pointer:
        """Run a job; see `Launcher.run`.

        Raises:
            M1Error: The job failed, ran out of time, or was deleted.
            ClusterError: The API server stayed away. The job runs on; start the component again.
        """
        resources = job.recipe.resources
        asked, trainer = resources.of(stage_kind(job.name)), resources.trainer
        body = objects.train_job(
            self._identity(job),
            asked,
            trainer,
            image=job.recipe.image,
            folder=str(job.folder),
            num_processes=job.num_processes,
        )
        name = body["metadata"]["name"]
        with cancelled_by_signals():
            try:
                self._ensure(body, job)
                failure = self._follow(name, job)
            except (Cancelled, KeyboardInterrupt):
                if self._is_ours(name):  # another run may have made it, and wait for it too
                    self._say(f"cancelled: deleting TrainJob {name}")
                    self.delete(name)
                raise
        return job.outcome(failure or self._without_pointer(name, job))

    def delete(self, name: str) -> None:
        """Delete a TrainJob, and with it its pods; fine if it is gone."""
        self._cluster.calling(
            lambda: self._cluster.objects.delete_namespaced_custom_object(
                *self._place, name, propagation_policy="Foreground"
            ),
            is_missing_ok=True,
        )

    @property
    def _place(self) -> tuple[str, str, str, str]:
        return objects.GROUP, objects.VERSION, self._cluster.namespace, objects.PLURAL

    def _is_ours(self, name: str) -> bool:
        found = self._read(name)
        label = objects.label_value(self._run.run_id) or None
        return found is not None and _meta(found).get("labels", {}).get(objects.RUN_LABEL) == label

    def _identity(self, job: StageJob) -> objects.Identity:
        stage_hash = stage_hashes(job.recipe)[job.name]
        return objects.Identity(
            name=objects.job_name(job.name, stage_hash),
            namespace=self._cluster.namespace,
            stage=job.name,
            stage_hash=stage_hash,
            run=self._run,
            owner=self._cluster.owner(),
        )

    def _read(self, name: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._cluster.calling(
            lambda: self._cluster.objects.get_namespaced_custom_object(*self._place, name),
            is_missing_ok=True,
        )
        return found

    def _ensure(self, body: dict[str, Any], job: StageJob) -> None:
        """Have the job exist: found under way, or made, after an old one is gone."""
        name = body["metadata"]["name"]
        found = self._read(name)
        if found is not None and ended(found) is None and "deletionTimestamp" not in _meta(found):
            wanted = body["metadata"]["annotations"][objects.HASH_ANNOTATION]
            if _meta(found).get("annotations", {}).get(objects.HASH_ANNOTATION) != wanted:
                raise M1Error(
                    f"TrainJob {name} in namespace {self._cluster.namespace} was not made for this "
                    "stage; delete or rename it"
                )
            self._say(f"TrainJob {name} is under way; following it")
            return
        if found is not None:
            self._say(f"TrainJob {name} of an earlier attempt is deleted")
            self.delete(name)
            self._wait_until_gone(name)
        job.prepare()
        try:
            self._cluster.calling(
                lambda: self._cluster.objects.create_namespaced_custom_object(*self._place, body)
            )
        except ClusterError:
            if self._read(name) is None:  # else made by an attempt whose answer was lost
                raise
        self._say(f"TrainJob {name} made in namespace {self._cluster.namespace}")

    def _wait_until_gone(self, name: str) -> None:
        deadline = time.monotonic() + _DELETE_SECONDS
        while self._read(name) is not None:
            if time.monotonic() > deadline:
                raise M1Error(
                    f"TrainJob {name} is still there {_DELETE_SECONDS:g} seconds after its "
                    "deletion; look at its finalizers and its pods' nodes"
                )
            time.sleep(1)

    def _follow(self, name: str, job: StageJob) -> str | None:
        """Wait for the job's end; why it failed, or None where it is complete."""
        resources = job.recipe.resources
        trainer, limit = resources.trainer, resources.of(stage_kind(job.name)).timeout_seconds
        began, ran = time.monotonic(), None
        progress = ProgressLines(job.name, job.folder, self._say)
        with self._streaming(name):
            while True:
                found = self._read(name)
                if found is None:
                    return f"TrainJob {name} was deleted by someone else; run the stage again"
                end = ended(found)
                if end is not None:
                    return None if end == "" else self._why(name, job, end)
                progress.look(found)
                if ran is None and self._has_started(name):
                    ran = time.monotonic()
                if ran is None and time.monotonic() - began > trainer.start_seconds:
                    self.delete(name)
                    return (
                        f"TrainJob {name} had no running pod after {trainer.start_seconds:g} "
                        "seconds (resources.trainer.start_seconds) and was deleted; look at its "
                        "queue, quota and node selector"
                    )
                if ran is not None and limit and time.monotonic() - ran > limit + _GRACE_SECONDS:
                    self.delete(name)
                    return (
                        f"TrainJob {name} ran on after its {limit} seconds "
                        f"(resources.{stage_kind(job.name)}.timeout_seconds) and was deleted"
                    )
                time.sleep(trainer.poll_seconds)

    @contextlib.contextmanager
    def _streaming(self, name: str) -> Iterator[None]:
        """Print the log of the first pod meanwhile, to its end unless something else happened."""
        stream = LogStream(self._cluster, name, write=lambda text: self._say(text.rstrip("\n")))
        try:
            yield
        except BaseException:
            stream.close(wait_seconds=0)
            raise
        stream.close()

    def _has_started(self, name: str) -> bool:
        phases = [pod.status.phase for pod in pods_of(self._cluster, name)]
        return any(phase != "Pending" for phase in phases)

    def _why(self, name: str, job: StageJob, reason: str) -> str:
        """What failed, with the last words of a pod that did."""
        failed = [p for p in pods_of(self._cluster, name) if p.status.phase == "Failed"]
        words = last_words(self._cluster, failed[0].metadata.name) if failed else ""
        said = f"; pod {failed[0].metadata.name} said:\n{words}" if words else ""
        return f"stage {job.name} failed in TrainJob {name}: {reason}{said}"

    def _without_pointer(self, name: str, job: StageJob) -> str:
        return (
            f"TrainJob {name} is complete, but stage {job.name} left no pointer in "
            f"{job.recipe.storage.root}; see whether its pods work on the same storage"
        )


def _meta(found: dict[str, Any]) -> dict[str, Any]:
    meta: dict[str, Any] = found.get("metadata", {})
    return meta


def ended(job: dict[str, Any]) -> str | None:
    """None while a TrainJob is under way, an empty text if it is complete, else why it failed."""
    for condition in job.get("status", {}).get("conditions", []):
        if condition["status"] != "True":
            continue
        if condition["type"] == "Complete":
            return ""
        if condition["type"] == "Failed":
            return f"{condition['reason']}: {condition['message']}".rstrip(": ")
    return None


@contextlib.contextmanager
def cancelled_by_signals() -> Iterator[None]:
    """Turn SIGTERM, by which Kubernetes ends a pod, into `Cancelled`, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def cancel(number: int, frame: FrameType | None) -> None:
        raise Cancelled(f"signal {number}")

    saved = signal.signal(signal.SIGTERM, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, saved)
