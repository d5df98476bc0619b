"""The words of a job's first pod, as they come."""

import contextlib
import sys
import threading
from collections.abc import Callable
from typing import Any

from m1.launcher.cluster import Cluster
from m1.launcher.objects import NODE

JOB_LABEL = "jobset.sigs.k8s.io/jobset-name"
_INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
_PAUSE_SECONDS = 2.0


def pods_of(cluster: Cluster, name: str) -> list[Any]:
    """Pods of a TrainJob, whose JobSet has its name, by the index of their node."""
    selector = f"{JOB_LABEL}={name}"
    found: Any = cluster.calling(
        lambda: cluster.core.list_namespaced_pod(cluster.namespace, label_selector=selector)
    )
    return sorted(found.items, key=lambda p: int((p.metadata.labels or {}).get(_INDEX_LABEL, 0)))


def last_words(cluster: Cluster, pod: str, *, lines: int = 20) -> str:
    """The end of a pod's log; empty where there is none any more."""
    from m1.launcher.cluster import ClusterError

    def read() -> str:
        return str(
            cluster.core.read_namespaced_pod_log(
                pod, cluster.namespace, container=NODE, tail_lines=lines
            )
        )

    with contextlib.suppress(ClusterError):  # it may be gone, or never have started
        return (cluster.calling(read, is_missing_ok=True) or "").strip()
    return ""


class LogStream:
    """Prints the log of a job's first pod from a thread, again from where a connection broke."""

    def __init__(
        self, cluster: Cluster, name: str, *, write: Callable[[str], Any] = sys.stdout.write
    ) -> None:
        self._cluster, self._name, self._write = cluster, name, write
        self._stop = threading.Event()
        self._seen = ""  # timestamp of the last line that was printed
        self._response: Any = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self, *, wait_seconds: float = 5.0) -> None:
        """Print what is there still, for so long at most, and end."""
        self._stop.set()
        self._thread.join(wait_seconds)

    def _run(self) -> None:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        from m1.launcher.cluster import ClusterError

        while True:
            is_last = self._stop.is_set()
            with contextlib.suppress(ApiException, HTTPError, ClusterError, OSError):
                pods = pods_of(self._cluster, self._name)
                if pods and pods[0].status.phase != "Pending":
                    self._follow(pods[0].metadata.name)
            if is_last:
                return
            self._stop.wait(_PAUSE_SECONDS)

    def _follow(self, pod: str) -> None:
        """Print until the container ends or the connection breaks."""
        response = self._cluster.core.read_namespaced_pod_log(
            pod,
            self._cluster.namespace,
            container=NODE,
            follow=not self._stop.is_set(),
            timestamps=True,
            _preload_content=False,
        )
        try:
            buffer = b""
            for chunk in response.stream(8192, decode_content=True):
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    self._print(line.decode(errors="replace"))
        finally:
            response.release_conn()

    def _print(self, line: str) -> None:
        moment, _, text = line.partition(" ")
        if moment > self._seen:  # RFC 3339 in UTC: texts compare as times do
            self._seen = moment
            self._write(f"{text}\n")
