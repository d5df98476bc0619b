"""The state of one stage as told by its events, and the words that describe it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_METRICS = ("reward", "loss", "accuracy")
"""Last part of the metrics worth a place in a row, best first."""
_FINAL_STATES = {"end": "done", "cached": "cached", "error": "failed"}


@dataclass
class StageProgress:
    """What is known of a stage; `apply` folds in one event."""

    name: str
    state: str = "waiting"
    """`waiting`, `running`, `done`, `cached` or `failed`."""
    started: float | None = None
    ended: float | None = None
    step: int = 0
    total: int = 0
    phase: str = ""
    message: str = ""
    warning: str = ""
    """The latest."""
    metrics: dict[str, float] = field(default_factory=dict)
    _first_step: tuple[int, float] | None = None
    """Step and time of this process's first progress: a resumed stage does not start at 0."""
    _last_step: tuple[int, float] | None = None

    def apply(self, event: Mapping[str, Any]) -> None:
        """Fold in one event."""
        when = float(event.get("time", time.time()))
        kind = event["event"]
        if kind == "start":
            self.state, self.started, self.ended = "running", when, None
            self._first_step = self._last_step = None
        elif kind in ("progress", "warning"):
            self.state = "running"
        else:
            self.state = _FINAL_STATES.get(kind, self.state)
            self.ended = when
        if self.started is None:
            self.started = when
        self.phase = event.get("phase") or self.phase
        if kind == "warning":
            self.warning = event.get("message") or self.warning
        else:
            self.message = event.get("message") or self.message
        self.metrics.update(event.get("metrics") or {})
        self.total = event.get("total") or self.total
        if event.get("step") is not None:
            self.step = event["step"]
            self._last_step = (self.step, when)
            self._first_step = self._first_step or self._last_step

    @property
    def elapsed_seconds(self) -> float:
        """From the start to the end, or to now."""
        if self.started is None:
            return 0.0
        return (self.ended if self.ended is not None else time.time()) - self.started

    @property
    def left_seconds(self) -> float | None:
        """Time left at the mean pace so far; None where nothing can be said."""
        if self.state != "running" or not self.total or not (self._first_step and self._last_step):
            return None
        steps = self._last_step[0] - self._first_step[0]
        if steps <= 0:
            return None
        pace = (self._last_step[1] - self._first_step[1]) / steps
        return max(0.0, (self.total - self.step) * pace - (time.time() - self._last_step[1]))

    @property
    def step_text(self) -> str:
        """`3/100`, or nothing."""
        return f"{self.step}/{self.total}" if self.total else ""

    @property
    def metric_text(self) -> str:
        """The latest reward or else loss or else accuracy, such as `loss 5.100`."""
        for wanted in _METRICS:
            for name, value in self.metrics.items():
                if name.rpartition("/")[2] == wanted:
                    return f"{wanted} {value:.3f}"
        return ""

    @property
    def speed_text(self) -> str:
        """Latest tokens per second, or nothing."""
        for name, value in self.metrics.items():
            if name.rpartition("/")[2] == "tokens_per_second":
                return f"{value:,.0f}"
        return ""

    def plain_line(self) -> str:
        """One line for a log."""
        parts = [f"{self.name}: {self.state}"]
        if self.state == "running":
            parts += [self.phase, self.step_text, self.metric_text]
            parts += [f"{self.speed_text} tokens/s" if self.speed_text else ""]
        elif self.state == "done":
            parts += [f"in {format_duration(self.elapsed_seconds)}", self.metric_text]
        elif self.state == "failed":
            parts += [self.phase, self.message]
        if self.warning:
            parts += [f"(warning: {self.warning})"]
        return " ".join(part for part in parts if part)


def format_duration(seconds: float) -> str:
    """`4.2s`, `3m07s` or `2h05m`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"
