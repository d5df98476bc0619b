"""One stage's MLflow run: parameters, metrics, the data and models it read, the model it made."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from m1.tracking.rollout_traces import RolloutTrace, log_rollout_traces
from m1.tracking.store import (
    PENDING,
    has_model,
    log_new_params,
    metric_key,
    short_digest,
)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

_FLUSH_SECONDS = 15.0
_MAX_METRICS_PER_BATCH = 1000
_log = logging.getLogger(__name__)


class StageRun:
    """An open MLflow run of one stage; made by `open_stage_run`."""

    def __init__(self, client: Any, run: Any, stage_hash: str) -> None:
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self._client = client
        self._run = run
        self._stage_hash = stage_hash
        self._pending: list[Any] = []
        self._flushed = time.monotonic()
        self._latest: dict[str, Any] = {}
        self._training_data: tuple[str, str] | None = None
        self._scored: dict[str, int] = {}
        # What an interrupted attempt left: MLflow would show repeated steps twice.
        self._known_keys = set(run.data.metrics)
        self._last_known_step: dict[str, int] = {}

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log the resolved slice of the recipe; nested tables become dotted names."""
        log_new_params(self._client, self._run, params)

    @property
    def num_pending(self) -> int:
        """Metrics that are buffered."""
        return len(self._pending)

    def log_metrics(
        self, metrics: Mapping[str, float], *, step: int, seconds: float | None = None
    ) -> None:
        """Buffer metrics of one step; they go out every 15 s and on close.

        Steps that an interrupted attempt of this run has logged already are left as they are.

        Args:
            metrics: By name.
            step: Counted from 1.
            seconds: Unix time they were measured at; absent: now.
        """
        from mlflow.entities import Metric

        now = _milliseconds() if seconds is None else int(seconds * 1000)
        new = [Metric(metric_key(name), float(v), now, step) for name, v in metrics.items()]
        fresh = [metric for metric in new if step > self._logged_up_to(metric.key)]
        self._latest |= {metric.key: metric for metric in new}
        self._pending += fresh
        if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self._flush_or_keep()

    def flush(self) -> None:
        """Write the buffered metrics now."""
        while self._pending:
            self._client.log_batch(self.run_id, metrics=self._pending[:_MAX_METRICS_PER_BATCH])
            del self._pending[:_MAX_METRICS_PER_BATCH]
        self._flushed = time.monotonic()

    def log_dataset(
        self, name: str, *, source_uri: str, digest: str, context: str = "training"
    ) -> None:
        """Record data that the run read, or made with context "output", by address and digest.

        Args:
            name: Name of the dataset.
            source_uri: Path or `s3://` address.
            digest: Its digest; MLflow's field keeps the first 36 characters, the tag m1.digest all.
            context: `training`, `evaluation` or `output`.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # The entity that mlflow.data's MetaDataset becomes, made directly: no source is resolved.
        dataset = Dataset(
            name=name,
            digest=short_digest(digest),
            source_type="s3" if source_uri.startswith("s3://") else "local",
            source=json.dumps({"uri": source_uri}),
        )
        tags = [InputTag("mlflow.data.context", context), InputTag("m1.digest", digest)]
        self._client.log_inputs(self.run_id, datasets=[DatasetInput(dataset, tags)])
        if context == "training":
            self._training_data = (dataset.name, dataset.digest)

    def log_input_model(self, model_id: str) -> None:
        """Link the model this run starts from."""
        from mlflow.entities import LoggedModelInput

        self._client.log_inputs(self.run_id, models=[LoggedModelInput(model_id)])

    def log_output_model(
        self,
        name: str,
        *,
        checkpoint_uri: str,
        step: int,
        parent_model_id: str | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> str:
        """Record the model this run made; the weights stay where they are.

        The latest metrics are attached to it, together with the training dataset.

        Args:
            name: Name, such as the stage's.
            checkpoint_uri: Where its weights lie.
            step: Optimizer step that made them.
            parent_model_id: The model it was trained from.
            params: Parameters of the model.

        Returns:
            Its id; that of the earlier attempt where an interrupted run had recorded the same
            checkpoint.
        """
        from mlflow.entities import LoggedModelOutput

        model_id = self._recorded_model(checkpoint_uri)
        if model_id is None:
            tags = {"checkpoint_uri": checkpoint_uri, "stage_hash": self._stage_hash}
            if parent_model_id is not None:
                tags["parent_model_id"] = parent_model_id
            model = self._client.create_logged_model(
                self.experiment_id,
                name=name,
                source_run_id=self.run_id,
                tags=tags,
                params={key: str(value) for key, value in (params or {}).items()},
                model_type="checkpoint",
            )
            model_id = str(model.model_id)
            self._client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step=step)])
        self._attach_latest_metrics(model_id)
        self._client.finalize_logged_model(model_id, "READY")
        return model_id

    def log_scores(
        self,
        model_id: str,
        *,
        dataset_name: str,
        dataset_digest: str,
        metrics: Mapping[str, float],
    ) -> None:
        """Record evaluation results of one model on one dataset.

        In this run's own charts the step is the position of the model among those scored, from 0.
        Of a model that the store lacks, as after a change of stores, only the run has the scores.
        """
        from mlflow.entities import Metric

        is_known = has_model(self._client, model_id)
        position = self._scored.setdefault(model_id, len(self._scored))
        now = _milliseconds()
        scores = [
            Metric(
                metric_key(name),
                float(value),
                now,
                position,
                model_id=model_id if is_known else None,
                dataset_name=dataset_name,
                dataset_digest=short_digest(dataset_digest),
                run_id=self.run_id,
            )
            for name, value in metrics.items()
        ]
        self._client.log_batch(self.run_id, metrics=scores)

    def log_rollouts(self, rollouts: Sequence[RolloutTrace], *, step: int) -> None:
        """Show rollouts of an RL step as traces; store trouble only warns."""
        from mlflow.exceptions import MlflowException

        try:
            log_rollout_traces(
                self._client,
                run_id=self.run_id,
                experiment_id=self.experiment_id,
                step=step,
                traces=rollouts,
            )
        except MlflowException as error:
            _log.warning("MLflow took no traces of step %d: %s", step, error)

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Upload a file as an artifact of the run, below `folder`."""
        self._client.log_artifact(self.run_id, str(path), folder)

    def known_model(self, model_id: str) -> str | None:
        """The store's id of a model `pending:<stage hash>`; None when it has none."""
        stage_hash = model_id.removeprefix(PENDING)
        found = self._client.search_logged_models(
            [self.experiment_id], filter_string=f"tags.stage_hash = '{stage_hash}'"
        )
        return str(found[0].model_id) if found else None

    def close(self, status: RunStatus = "FINISHED") -> None:
        """Write what is buffered and end the run; after a failure, store trouble only warns."""
        try:
            self.flush()
            self._client.set_terminated(self.run_id, status=status)
        except Exception as error:
            if status == "FINISHED":
                raise
            # The reason of the failure is on its way up; the store's trouble must not replace it.
            _log.warning("MLflow did not take the end of the run: %s", error)

    def _flush_or_keep(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.flush()
        except MlflowException as error:
            # Training goes on while the store is away; the next flush tries again.
            self._flushed = time.monotonic()
            _log.warning("MLflow took no metrics; %d are kept: %s", len(self._pending), error)

    def _logged_up_to(self, key: str) -> int:
        if key not in self._known_keys:
            return -1
        if key not in self._last_known_step:
            history = self._client.get_metric_history(self.run_id, key)
            self._last_known_step[key] = max((metric.step for metric in history), default=-1)
        return self._last_known_step[key]

    def _recorded_model(self, checkpoint_uri: str) -> str | None:
        outputs = self._run.outputs.model_outputs if self._run.outputs else []
        for output in outputs:
            model = self._client.get_logged_model(output.model_id)
            if model.tags.get("checkpoint_uri") == checkpoint_uri:
                return str(model.model_id)
        return None

    def _attach_latest_metrics(self, model_id: str) -> None:
        from mlflow.entities import Metric

        self.flush()
        name, digest = self._training_data or (None, None)
        attached = [
            Metric(
                metric.key,
                metric.value,
                metric.timestamp,
                metric.step,
                model_id=model_id,
                dataset_name=name,
                dataset_digest=digest,
                run_id=self.run_id,
            )
            for metric in self._latest.values()
        ]
        for start in range(0, len(attached), _MAX_METRICS_PER_BATCH):
            batch = attached[start : start + _MAX_METRICS_PER_BATCH]
            self._client.log_batch(self.run_id, metrics=batch)


def _milliseconds() -> int:
    return int(time.time() * 1000)
