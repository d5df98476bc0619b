"""What a stage's body works with: its folders and inputs, its log, its checkpoints' safe places."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m1.stage_backup import CheckpointBackup
from m1.storage import disk_errors
from m1.tracking.events import EventLog
from m1.tracking.outbox import QueuedRun
from m1.types import Pointer

METRICS = "metrics.jsonl"
ROLLOUTS = "rollouts"
"""Folder with all rollouts, kept by RL stages (`m1.rollout.traces`)."""
WARNINGS = "warnings.jsonl"
PROBABILITIES = "probabilities.json"
"""Probabilities of sampled tokens in training and inference mode, kept by the rl stage."""


@dataclass(frozen=True)
class StageOutput:
    """What a stage's body returns; its files lie in the context's `output` folder."""

    step: int | None = None
    """Optimizer step of a model."""
    is_model: bool = False
    """Whether `output` holds a checkpoint, to be recorded as a logged model."""
    datasets: tuple[str, ...] = ()
    """Subfolders of `output` that are datasets, to be recorded with their digests."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Small JSON facts for the pointer."""


@dataclass
class StageContext:
    """What a stage's body works with."""

    name: str
    stage_hash: str
    folder: Path
    """The stage's own folder, kept between attempts."""
    inputs: Mapping[str, Pointer]
    """Outputs of earlier stages, by stage."""
    _run: QueuedRun | None
    events: EventLog
    _fetch: Callable[[Pointer], Path]
    output_uri: str
    """Where `output` will lie for later stages."""
    _backup: CheckpointBackup | None = None

    @property
    def run(self) -> QueuedRun:
        """The stage's MLflow run, which only the first rank has."""
        if self._run is None:
            raise RuntimeError(f"stage {self.name} records on its first rank only")
        return self._run

    @property
    def is_recording(self) -> bool:
        """Whether this process keeps records: the first rank does."""
        return self._run is not None

    @property
    def output(self) -> Path:
        """Folder for what the stage makes; must be complete when the body returns."""
        return self.folder / "output"

    @property
    def checkpoints(self) -> Path:
        """Folder of resumable checkpoints."""
        return self.folder / "checkpoints"

    def path_of(self, stage: str) -> Path:
        """Local folder with the output of an earlier stage, verified against its digest."""
        return self._fetch(self.inputs[stage])

    def phase(self, phase: str, done: int, total: int) -> None:
        """Show progress of work that has no metrics."""
        self.events.emit(self.name, "progress", phase=phase, step=done, total=total)

    def log(self, metrics: Mapping[str, float], *, step: int, total: int) -> None:
        """Record metrics of `step` (counted from 1) in metrics.jsonl, MLflow and the display.

        Ranks but the first record nothing.
        """
        if self._run is None:
            return
        line = {"step": step, "total": total, "time": time.time(), "metrics": dict(metrics)}
        with disk_errors(self.folder), (self.folder / METRICS).open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._run.log_metrics(metrics, step=step)
        self.events.emit(self.name, "progress", step=step, total=total, metrics=dict(metrics))

    def warn(self, message: str) -> None:
        """Record what a user should look at, in warnings.jsonl and the display.

        Ranks but the first record nothing.
        """
        if self._run is None:
            return
        line = {"time": time.time(), "message": message}
        with disk_errors(self.folder), (self.folder / WARNINGS).open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.events.emit(self.name, "warning", message=message)

    def back_up(self, checkpoint: Path, *, marker: str, keep: int) -> frozenset[Path]:
        """Begin to keep a complete checkpoint on S3 too, where the storage is there.

        Args:
            checkpoint: Its folder.
            marker: Name of its file that makes it complete.
            keep: How many stay on S3.

        Returns:
            Checkpoints that must not be removed here yet.
        """
        if self._backup is None or self._run is None:
            return frozenset()
        records = [self.folder / name for name in (METRICS, WARNINGS, ROLLOUTS)]
        needed, errors = self._backup.send(checkpoint, marker=marker, keep=keep, records=records)
        for error in errors:
            self.warn(f"{error}; the next checkpoint is tried again")
        return needed

    def restore(self, *, marker: str) -> None:
        """Bring the newest checkpoint that is complete on S3, unless this machine has a newer."""
        if self._backup is not None:
            self._backup.restore(self.checkpoints, marker=marker)

    def rewind(self, step: int) -> None:
        """Drop metrics after `step`: work that a resumed stage is about to repeat."""
        if self._run is None:
            return
        path = self.folder / METRICS
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        with disk_errors(self.folder):
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; a torn last line is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines
