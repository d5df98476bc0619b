"""Prometheus metrics of one server."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from m1.inference.loop import EngineLoop

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """What /metrics shows; one registry a server, so that several fit in a process."""

    def __init__(self, loop: EngineLoop) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "m1_requests", "Requests by endpoint and status.", ("path", "status"),
            registry=self.registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "m1_prompt_tokens", "Prompt tokens accepted.", registry=self.registry
        )
        self.completion_tokens = Counter(
            "m1_completion_tokens", "Tokens sampled for clients.", registry=self.registry
        )
        self.finished = Counter(
            "m1_completions", "Completions by finish reason.", ("reason",), registry=self.registry
        )
        self.latency = Histogram(
            "m1_request_seconds", "Seconds from a request to its last byte.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "m1_first_token_seconds", "Seconds to the first token; of /generate none.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        core = loop.core
        scheduler = core.scheduler
        for name, text, read in (
            ("m1_pending_completions", "Queued or running.", lambda: loop.num_pending),
            ("m1_running_sequences", "Decoding now.", lambda: len(scheduler.running)),
            ("m1_free_slots", "Free slots of states.", lambda: len(scheduler.slots)),
            ("m1_free_pages", "Free pages of keys and values.", lambda: len(scheduler.pages)),
            ("m1_preemptions", "Since the start.", lambda: scheduler.num_preemptions),
            ("m1_prefix_hits", "Prompts that went on.", lambda: scheduler.prefixes.hits),
            ("m1_prefilled_tokens", "Prompt tokens computed.", lambda: core.num_prefilled),
            ("m1_engine_steps", "Model calls.", lambda: core.num_steps),
            ("m1_policy_version", "Of the weights.", lambda: core.policy_version),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)

    def render(self) -> bytes:
        """The text of /metrics."""
        return generate_latest(self.registry)
