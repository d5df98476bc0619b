"""Lines of a component's log that say how far its job is."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m1.stage import METRICS, read_metrics

_EVERY_SECONDS = 30.0


class ProgressLines:
    """Says the newest step of a stage, at most every half minute."""

    def __init__(self, stage: str, folder: Path, say: Callable[[str], Any]) -> None:
        """Watch a stage.

        Args:
            stage: Its name.
            folder: Its folder, which its first rank writes metrics to.
            say: Takes a line.
        """
        self._stage, self._path, self._say = stage, folder / METRICS, say
        self._said, self._time = "", -_EVERY_SECONDS

    def look(self, job: dict[str, Any]) -> None:
        """Say what is new in the stage's metrics, or in the status of its TrainJob."""
        if time.monotonic() - self._time < _EVERY_SECONDS:
            return
        line = self._of_metrics() or self._of_status(job)
        if line and line != self._said:
            self._said, self._time = line, time.monotonic()
            self._say(line)

    def _of_metrics(self) -> str:
        rows = read_metrics(self._path)
        if not rows:
            return ""
        row = rows[-1]
        values = [
            f"{name.rpartition('/')[2]} {value:.4g}"
            for name, value in list(row["metrics"].items())[:4]
            if isinstance(value, int | float)
        ]
        return f"{self._stage} step {row['step']}/{row['total']}: {', '.join(values)}"

    def _of_status(self, job: dict[str, Any]) -> str:
        status = job.get("status", {})
        share = status.get("trainerStatus", {}).get("progressPercentage")
        if share is not None:
            return f"{self._stage} {share}%"
        parts = [
            f"{entry['name']}: {entry['active']} active, {entry['ready']} ready"
            for entry in status.get("jobsStatus", [])
        ]
        return f"{self._stage} " + "; ".join(parts) if parts else ""
