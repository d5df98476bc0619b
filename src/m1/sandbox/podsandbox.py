"""Sandboxes as pods of a cluster: the pod is the isolation, its owner the lease.

The namespace must hold a policy that denies all traffic (manifests/base/sandbox); whether the
cluster's network plugin enforces it, only a test can tell.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import tenacity

from m1.sandbox import pods
from m1.sandbox.base import (
    MIB,
    WORK,
    ClosedAtExit,
    Environment,
    ExecResult,
    Limits,
    OutputSink,
    SandboxError,
    SandboxGone,
)
from m1.sandbox.files import FilesByCommands
from m1.sandbox.podexec import PodAddress, PodExecutor
from m1.sandbox.pods import ClusterConfig

_T = TypeVar("_T")
_POLL_SECONDS = (0.05, 0.5)
_PACK = "cd / && find work tmp -mindepth 1 -maxdepth 1 -print0 | tar -c --null -T - -f -"
_UNPACK = 'head -c "$1" | tar -x --no-same-owner -C / -f -'
_FATAL = {"ErrImageNeverPull", "ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError"}


class PodSandbox(ClosedAtExit, FilesByCommands):
    """A running pod and whoever owns it; see `base.Sandbox`."""

    def __init__(
        self,
        backend: "PodBackend",
        name: str,
        address: PodAddress,
        environment: Environment,
        limits: Limits,
    ) -> None:
        self._backend = backend
        self._name = name
        self._limits = limits
        self._environment = environment
        self._executor = PodExecutor(backend.configuration, address)
        self._is_closed = False

    @property
    def name(self) -> str:
        """Name of the Job or Sandbox object."""
        return self._name

    def exec(
        self,
        command: Sequence[str],
        *,
        stdin: bytes = b"",
        limits: Limits | None = None,
        environment: Mapping[str, str] | None = None,
        folder: str = WORK,
        on_output: OutputSink | None = None,
    ) -> ExecResult:
        """Run a command; see `Sandbox.exec`."""
        if self._is_closed:
            raise SandboxError("the sandbox is closed")
        asked = limits or self._limits
        # What the pod was given cannot be raised by one command.
        bounds = replace(asked, scratch_mib=min(asked.scratch_mib, self._limits.scratch_mib))
        return self._executor.run(
            command,
            stdin=stdin,
            limits=bounds,
            environment=environment or {},
            folder=folder,
            on_output=on_output,
        )

    def renew(self, seconds: float) -> None:
        """Keep the sandbox for so long from now."""
        self._backend.renew(self._name, seconds)

    def fork(self) -> "PodSandbox":
        """A new pod with all files of /work and /tmp, which pass through this process."""
        size = (self._limits.scratch_mib + 16) * MIB
        bounds = replace(self._limits, output_bytes=size, wall_seconds=600, cpu_seconds=600)
        packed = self.exec(["sh", "-c", _PACK], limits=bounds)
        if packed.exit_code or packed.stopped_by:
            raise SandboxError(f"{self._name} cannot be copied: {packed.stderr[-300:]!r}")
        other = self._backend.open(replace(self._environment, layers={}), limits=self._limits)
        data = packed.stdout
        command = ["sh", "-c", _UNPACK, "sh", str(len(data))]
        result = other.exec(command, stdin=data, limits=bounds)
        if result.exit_code or result.stopped_by:
            other.close()
            raise SandboxError(f"{self._name} cannot be copied: {result.stderr[-300:]!r}")
        return other

    def close(self) -> None:
        """Delete the objects; the cluster deletes what they own."""
        if not self._is_closed:
            self._is_closed = True
            self._backend.remove(self._name)


class PodBackend:
    """What Jobs and agent-sandbox share: a connection, waiting for pods, uploads."""

    name = "pods"

    def __init__(self, config: ClusterConfig | None = None, *, is_strict: bool = True) -> None:
        """Connect, and look whether the namespace isolates.

        Args:
            config: Where and how.
            is_strict: Refuse a namespace without a policy that denies all traffic.

        Raises:
            SandboxError: The cluster cannot be reached, or does not isolate as asked.
        """
        self.config = config or ClusterConfig()
        self.configuration = load_configuration(self.config)
        from kubernetes import client

        self.api = client.ApiClient(self.configuration)
        self.core = client.CoreV1Api(self.api)
        if is_strict:
            self._check_policy(client.NetworkingV1Api(self.api))

    def open(
        self, environment: Environment | None = None, *, limits: Limits | None = None
    ) -> PodSandbox:
        """A fresh sandbox; layers are uploaded, so large ones belong into an image."""
        environment = environment or Environment()
        if environment.read_only:
            raise SandboxError("a cluster has no read_only layers; put them into the image")
        for path in environment.layers:
            if path != WORK and not path.startswith((f"{WORK}/", "/tmp/")):
                raise SandboxError(f"layer {path!r} must lie below /work or /tmp in a cluster")
        limits, name = limits or Limits(), pods.new_name()
        try:
            self.calling(lambda: self._create(name, environment.image or self.config.image, limits))
            address = self._wait_until_running(name)
            sandbox = PodSandbox(self, name, address, environment, limits)
            for path, source in environment.layers.items():
                sandbox.write_folder(path, source)
        except BaseException:
            with contextlib.suppress(SandboxError):
                self.remove(name)
            raise
        return sandbox

    def calling(self, call: Callable[[], _T], *, is_missing_ok: bool = False) -> _T | None:
        """Call the API server, again while it is out of reach; None for 404 where that is fine."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        def is_passing(error: BaseException) -> bool:
            busy = isinstance(error, ApiException) and error.status in (0, 429, 500, 502, 503, 504)
            return busy or isinstance(error, HTTPError)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_passing),
            stop=tenacity.stop_after_delay(self.config.retry_seconds),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=2),
            reraise=True,
        )
        try:
            return retrying(call)
        except ApiException as error:
            if error.status == 404 and is_missing_ok:
                return None
            if error.status == 404:
                raise SandboxGone(f"the API server knows no such object: {error.reason}") from error
            raise SandboxError(f"the API server refused ({error.status}): {error.body}") from error
        except HTTPError as error:
            raise SandboxError(f"the API server is out of reach: {error}") from error

    def _create(self, name: str, image: str, limits: Limits) -> None:
        raise NotImplementedError

    def _pod_of(self, name: str) -> Any:
        """The sandbox's pod, or None while there is none."""
        selector = f"m1.sandbox/name={name}"
        found = self.calling(
            lambda: self.core.list_namespaced_pod(self.config.namespace, label_selector=selector)
        )
        return found.items[0] if found is not None and found.items else None

    def _read(self, name: str) -> Any:
        raise NotImplementedError

    def renew(self, name: str, seconds: float) -> None:
        """Move the end of a sandbox's lease."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """Delete a sandbox; fine if it is gone."""
        raise NotImplementedError

    def _wait_until_running(self, name: str) -> PodAddress:
        deadline = time.monotonic() + self.config.start_seconds
        pause, most = _POLL_SECONDS
        reason = "no pod was made"
        while time.monotonic() < deadline:
            pod = self._pod_of(name)
            if pod is not None:
                statuses = pod.status.container_statuses or []
                waiting = statuses[0].state.waiting if statuses else None
                reason = waiting.reason if waiting else str(pod.status.phase)
                if statuses and statuses[0].state.running:
                    return PodAddress(self.config.namespace, pod.metadata.name)
                if reason in _FATAL or pod.status.phase in ("Failed", "Succeeded"):
                    said = waiting.message if waiting else pod.status.reason
                    raise SandboxError(f"pod of {name} cannot run: {reason}: {said}")
            elif self.calling(lambda: self._read(name), is_missing_ok=True) is None:
                raise SandboxError(
                    f"{name} ended before it ran (last seen: {reason}); "
                    f"kubectl -n {self.config.namespace} get events says why"
                )
            time.sleep(pause)
            pause = min(most, 1.3 * pause)
        raise SandboxError(
            f"sandbox {name} did not run within {self.config.start_seconds} s ({reason}); "
            "look at the namespace's quota and queue"
        )

    def _check_policy(self, networking: Any) -> None:
        found = self.calling(
            lambda: networking.list_namespaced_network_policy(self.config.namespace)
        )
        for policy in found.items if found is not None else []:
            spec = policy.spec
            selects_all = not (
                spec.pod_selector.match_labels or spec.pod_selector.match_expressions
            )
            is_closed = {"Ingress", "Egress"} <= set(spec.policy_types or [])
            if selects_all and is_closed and not spec.ingress and not spec.egress:
                return
        raise SandboxError(
            f"namespace {self.config.namespace} has no NetworkPolicy that denies all traffic; "
            "apply manifests/base/sandbox"
        )


def load_configuration(config: ClusterConfig) -> Any:
    """`kubernetes.client.Configuration` from a file, or from the pod this runs in."""
    try:
        from kubernetes import client
        from kubernetes import config as loading
    except ImportError as error:
        raise SandboxError("a cluster needs the package kubernetes: m1[pipelines]") from error
    configuration = client.Configuration()
    try:
        if config.kubeconfig is None:
            with contextlib.suppress(loading.ConfigException):
                loading.load_incluster_config(client_configuration=configuration)
                return configuration
        loading.load_kube_config(
            config.kubeconfig, context=config.context, client_configuration=configuration
        )
    except (loading.ConfigException, OSError) as error:
        raise SandboxError(f"no cluster is configured: {error}; set KUBECONFIG") from error
    configuration.connection_pool_maxsize = 64
    configuration.retries = False
    return configuration
