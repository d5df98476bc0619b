"""Which MLflow run a stage writes to: its task's own, one under the pipeline's, or one alone."""

import os
from collections.abc import Mapping
from typing import Any

from m1.tracking.stage_run import StageRun
from m1.tracking.store import (
    TAG_PARENT_RUN,
    TAG_STAGE,
    TAG_STAGE_HASH,
    child_runs,
    ensure_experiment,
    find_run,
    open_client,
)
from m1.types import M1Error


def open_stage_run(
    *,
    uri: str,
    experiment: str,
    stage: str,
    stage_hash: str,
    tags: Mapping[str, str] | None = None,
) -> StageRun:
    """Open the run of a stage, resuming an interrupted one of the same stage hash.

    MLFLOW_RUN_ID decides where it goes. KFP's MLflow plugin names the task's own nested run there,
    which is used; our launcher names the pipeline's run, under which the stage's run is nested.
    Without it the run stands alone, in the experiment of MLFLOW_EXPERIMENT_ID where that is set.

    Args:
        uri: MLflow tracking URI.
        experiment: Experiment of a run that stands alone; a nested one is in its parent's.
        stage: Name of the stage.
        stage_hash: Its hash.
        tags: Further tags.

    Returns:
        The open run.

    Raises:
        M1Error: If MLFLOW_RUN_ID names a run that the store does not have.
    """
    client = open_client(uri)
    all_tags = {
        **(tags or {}),
        TAG_STAGE: stage,
        TAG_STAGE_HASH: stage_hash,
        "mlflow.source.name": f"m1 stage {stage}",
    }
    run_id = os.environ.get("MLFLOW_RUN_ID")
    context = _named_run(client, run_id, uri) if run_id else None
    if context is not None and TAG_PARENT_RUN in context.data.tags:
        return StageRun(client, _reopen(client, context, all_tags), stage_hash)
    if context is not None:
        experiment_id = context.info.experiment_id
        all_tags[TAG_PARENT_RUN] = context.info.run_id
        candidates = child_runs(client, context, stage_hash)
    else:
        named = os.environ.get("MLFLOW_EXPERIMENT_ID")
        experiment_id = named or ensure_experiment(client, experiment)
        candidates = _lone_runs(client, experiment_id, stage_hash)
    for run in candidates:
        if run.info.status != "FINISHED":
            return StageRun(client, _reopen(client, run, all_tags), stage_hash)
    name = f"{stage}-{stage_hash[:12]}"
    run = client.create_run(experiment_id, run_name=name, tags=all_tags)
    return StageRun(client, run, stage_hash)


def _named_run(client: Any, run_id: str, uri: str) -> Any:
    run = find_run(client, run_id)
    if run is None:
        raise M1Error(
            f"MLFLOW_RUN_ID is {run_id}, but the store at {uri} has no such run; unset it, or set "
            "MLFLOW_TRACKING_URI to the store that has it."
        )
    return run


def _lone_runs(client: Any, experiment_id: str, stage_hash: str) -> list[Any]:
    query = f"tags.`{TAG_STAGE_HASH}` = '{stage_hash}'"
    runs = client.search_runs([experiment_id], filter_string=query)
    return [run for run in runs if TAG_PARENT_RUN not in run.data.tags]


def _reopen(client: Any, run: Any, tags: Mapping[str, str]) -> Any:
    from mlflow.entities import RunTag

    run_id = run.info.run_id
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    client.update_run(run_id, status="RUNNING")
    return client.get_run(run_id)
