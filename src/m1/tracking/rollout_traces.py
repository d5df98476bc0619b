"""Rollouts as MLflow traces: prompt in, completion out, rewards beside them."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TAG_STEP = "m1.step"
_VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING")


@dataclass(frozen=True)
class RolloutTrace:
    """What is shown of one rollout."""

    task_id: str
    source: str
    prompt: str
    text: str
    finish_reason: str
    reward: float
    accuracy: float
    parts: Mapping[str, float]
    num_tokens: int
    first_policy_version: int
    last_policy_version: int


def log_rollout_traces(
    client: Any, *, run_id: str, experiment_id: str, step: int, traces: Sequence[RolloutTrace]
) -> None:
    """Record traces of an RL step under a run, unless an earlier attempt at the step has.

    Args:
        client: An `MlflowClient`.
        run_id: The stage's run.
        experiment_id: Its experiment.
        step: RL step, a tag of each trace.
        traces: What to show.
    """
    known = client.search_traces(
        locations=[experiment_id],
        run_id=run_id,
        filter_string=f"tags.`{TAG_STEP}` = '{step}'",
        include_spans=False,
    )
    with _default_store(client.tracking_uri):
        for trace in traces[len(known) :]:
            _log(client, run_id, experiment_id, step, trace)


def _log(client: Any, run_id: str, experiment_id: str, step: int, trace: RolloutTrace) -> None:
    facts = {
        "reward": trace.reward,
        "accuracy": trace.accuracy,
        **{f"reward.{name}": value for name, value in trace.parts.items()},
        "num_tokens": trace.num_tokens,
        "first_policy_version": trace.first_policy_version,
        "last_policy_version": trace.last_policy_version,
    }
    tags = {
        TAG_STEP: str(step),
        "m1.task_id": trace.task_id,
        "m1.source": trace.source,
        "m1.finish_reason": trace.finish_reason,
        "m1.accuracy": f"{trace.accuracy:g}",
    }
    span = client.start_trace(
        "rollout",
        span_type="LLM",
        inputs={"prompt": trace.prompt},
        attributes={"step": step, "finish_reason": trace.finish_reason, **facts},
        tags=tags,
        experiment_id=experiment_id,
        run_id=run_id,
    )
    client.end_trace(span.trace_id, outputs={"completion": trace.text, **facts})


@contextlib.contextmanager
def _default_store(uri: str) -> Iterator[None]:
    """Make `uri` MLflow's default store, which is where it writes traces, and undo that.

    Written at once: a background writer would still be at work when the default is back.
    """
    import mlflow

    saved = {name: os.environ.get(name) for name in _VARIABLES}
    before = mlflow.get_tracking_uri()
    os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # which also sets the variable
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
