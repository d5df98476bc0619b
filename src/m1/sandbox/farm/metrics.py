"""What a farm tells Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from m1.sandbox.base import SandboxError

_SHORT = (0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_LONG = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 1800)


class FarmMetrics:
    """One set for each farm; `registry` is what a server shows."""

    def __init__(self, backend: str, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        labels = ("backend",)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name, text, labels, registry=self.registry, buckets=buckets)
            return made.labels(backend)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, labels, registry=self.registry).labels(backend)

        self.queue_seconds = histogram(
            "m1_sandbox_queue_seconds", "From asking for a lease to the right to open.", _LONG
        )
        self.start_seconds = histogram(
            "m1_sandbox_start_seconds", "From the right to open to an open sandbox.", _SHORT
        )
        self.exec_seconds = histogram("m1_sandbox_exec_seconds", "Wall time of a command.", _LONG)
        self.leased = gauge("m1_sandbox_leased", "Sandboxes in use.")
        self.waiting = gauge("m1_sandbox_waiting", "Callers that wait for a sandbox.")
        self.warm = gauge("m1_sandbox_warm", "Sandboxes opened ahead.")
        failures = Counter(
            "m1_sandbox_failures",
            "By kind: open, exec, gone, expired, full, and limits met as limit_<name>.",
            ("backend", "kind"),
            registry=self.registry,
        )
        self._backend, self._failures = backend, failures

    def failed(self, kind: str) -> None:
        """Count a failure."""
        self._failures.labels(self._backend, kind).inc()

    def value(self, name: str, **labels: str) -> float:
        """One number, 0 where nothing was counted yet."""
        found = self.registry.get_sample_value(name, {"backend": self._backend, **labels})
        return found or 0.0


class MetricsPage:
    """An HTTP server of one farm's numbers."""

    def __init__(self, metrics: FarmMetrics, port: int) -> None:
        """Serve.

        Args:
            metrics: What is shown.
            port: On every address; 0 takes a free one.

        Raises:
            SandboxError: The port is taken.
        """
        try:
            self._server, self._thread = start_http_server(port, registry=metrics.registry)
        except OSError as error:
            raise SandboxError(
                f"the farm's metrics cannot be served at port {port}: {error}; choose another one"
            ) from error
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
