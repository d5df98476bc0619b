"""A stage's run whose records wait on disk while the MLflow server is away.

Training never stops for its records. What the server does not take stands in `lineage.jsonl` in the
stage's folder, one call a line (metrics stand in metrics.jsonl anyway), is offered again every
minute, and by `send_pending` later. A model that the server has not seen is called
`pending:<stage hash>`; the id it gets later replaces that in the pointer.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from m1.config.stages import in_order
from m1.storage import atomic_write
from m1.tracking.rollout_traces import RolloutTrace
from m1.tracking.stage_run import RunStatus, StageRun
from m1.tracking.store import PENDING, is_away, require_answer

JOURNAL = "lineage.jsonl"
METRICS = "metrics.jsonl"
_AGAIN_SECONDS = 60.0
_log = logging.getLogger(__name__)


class QueuedRun:
    """The calls of a `StageRun`, in order, now or when the server is back."""

    def __init__(
        self,
        uri: str,
        open_run: Callable[[], StageRun],
        folder: Path,
        stage_hash: str,
        *,
        journal: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Open the run if the server answers.

        Args:
            uri: MLflow tracking URI.
            open_run: Opens or resumes the run.
            folder: The stage's own.
            stage_hash: The stage's hash.
            journal: Calls of an ended stage that wait; absent: the stage begins.
        """
        self._uri, self._open_run, self._stage_hash = uri, open_run, stage_hash
        self._journal, self._metrics = folder / JOURNAL, folder / METRICS
        self._waiting = [dict(call) for call in journal]
        self._run: StageRun | None = None
        self._next_attempt = 0.0
        self._made_model: str | None = None
        self._deliver()

    @property
    def run_id(self) -> str:
        """The run's id; empty while the server has not seen it."""
        return self._run.run_id if self._run is not None else ""

    @property
    def model_id(self) -> str | None:
        """The model that the run made, by the id known so far."""
        return self._made_model

    @property
    def is_delivered(self) -> bool:
        """Whether the server has all of it."""
        return self._run is not None and not self._waiting and not self._run.num_pending

    def log_params(self, params: Mapping[str, Any]) -> None:
        """See `StageRun.log_params`."""
        self._call("log_params", dict(params))

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """See `StageRun.log_metrics`; while the run is not open, metrics.jsonl keeps them."""
        if self._run is None:
            self._deliver()
            return  # if that opened the run, it read the file, which has this step too
        try:
            self._run.log_metrics(metrics, step=step)
        except Exception as error:
            self._keep_or_raise(error)
        if self._waiting:
            self._deliver()

    def log_dataset(
        self, name: str, *, source_uri: str, digest: str, context: str = "training"
    ) -> None:
        """See `StageRun.log_dataset`."""
        self._call("log_dataset", name, source_uri=source_uri, digest=digest, context=context)

    def log_input_model(self, model_id: str) -> None:
        """See `StageRun.log_input_model`."""
        self._call("log_input_model", model_id)

    def log_output_model(
        self, name: str, *, checkpoint_uri: str, step: int, parent_model_id: str | None = None
    ) -> str:
        """See `StageRun.log_output_model`; `pending:<stage hash>` while the server is away."""
        self._made_model = f"{PENDING}{self._stage_hash}"
        self._call(
            "log_output_model",
            name,
            checkpoint_uri=checkpoint_uri,
            step=step,
            parent_model_id=parent_model_id,
        )
        return self._made_model

    def log_scores(
        self,
        model_id: str,
        *,
        dataset_name: str,
        dataset_digest: str,
        metrics: Mapping[str, float],
    ) -> None:
        """See `StageRun.log_scores`."""
        self._call(
            "log_scores",
            model_id,
            dataset_name=dataset_name,
            dataset_digest=dataset_digest,
            metrics=dict(metrics),
        )

    def log_rollouts(self, rollouts: Sequence[RolloutTrace], *, step: int) -> None:
        """See `StageRun.log_rollouts`; left out while the server is away: files hold them."""
        if self._run is not None and time.monotonic() >= self._next_attempt:
            self._run.log_rollouts(rollouts, step=step)

    def close(self, status: RunStatus = "FINISHED") -> None:
        """End the run, or leave its journal for `send_pending`."""
        self._next_attempt = 0.0
        self._call("close", status)
        if not self.is_delivered:
            self._write_journal()
            _log.warning("MLflow is away; %s keeps what it has not taken", self._journal)

    def _call(self, method: str, *args: Any, **keywords: Any) -> None:
        self._waiting.append({"method": method, "args": args, "keywords": keywords})
        self._deliver()
        if self._waiting and time.monotonic() < self._next_attempt:
            self._write_journal()

    def _deliver(self) -> None:
        if time.monotonic() < self._next_attempt:
            return
        try:
            if self._next_attempt or self._run is None:
                # One short question, as the client's own retries would hold the stage for minutes.
                require_answer(self._uri, num_attempts=1, timeout_seconds=2)
            self._next_attempt = 0.0
            if self._run is None:
                self._run = self._open_run()
                self._replay_metrics(self._run)
            while self._waiting:
                self._apply(self._run, self._waiting[0])
                del self._waiting[0]
            self._journal.unlink(missing_ok=True)
        except Exception as error:
            self._keep_or_raise(error)

    def _apply(self, run: StageRun, call: Mapping[str, Any]) -> None:
        keywords = dict(call["keywords"])
        args = [run.known_model(a) if str(a).startswith(PENDING) else a for a in call["args"]]
        parent = keywords.get("parent_model_id")
        if parent is not None and parent.startswith(PENDING):
            keywords["parent_model_id"] = run.known_model(parent)
        if call["method"] in ("log_input_model", "log_scores") and args[0] is None:
            _log.warning("MLflow has no model of %s; its link is left out", call["args"][0])
            return
        found = getattr(run, call["method"])(*args, **keywords)
        if call["method"] == "log_output_model":
            self._made_model = found

    def _replay_metrics(self, run: StageRun) -> None:
        if not self._metrics.exists():
            return
        for line in self._metrics.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # torn by a kill
                continue
            run.log_metrics(row["metrics"], step=row["step"], seconds=row.get("time"))

    def _keep_or_raise(self, error: Exception) -> None:
        if not is_away(error, self._uri):
            raise error
        self._next_attempt = time.monotonic() + _AGAIN_SECONDS
        if self._waiting:
            self._write_journal()
        _log.warning("MLflow is away (%s); records wait in %s", error, self._journal)

    def _write_journal(self) -> None:
        lines = [json.dumps(call, default=str) + "\n" for call in self._waiting]
        atomic_write(self._journal, "".join(lines).encode())


def journals(root: Path) -> list[Path]:
    """Journals of stages below a local run root, models before those that were made of them."""
    found = sorted(root.glob(f"stages/*/{JOURNAL}"))
    order = in_order(_stage_of(path) for path in found)
    return sorted(found, key=lambda path: order.index(_stage_of(path)))


def _stage_of(journal: Path) -> str:
    return journal.parent.name.rpartition("-")[0]


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The calls of a journal."""
    return [json.loads(line) for line in path.read_text().splitlines()]
