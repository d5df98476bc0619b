"""Lineage of a pipeline in MLflow: its run, cached stages and closing artifacts.

The pipeline is a parent run tagged with the recipe's hash; every stage is a nested run
(`m1.tracking.stage_run`); every checkpoint is a logged model linked as output of one run and input
of the next.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m1.tracking.opening import open_stage_run
from m1.tracking.page import lineage_page
from m1.tracking.stage_run import RunStatus, StageRun
from m1.tracking.store import (
    TAG_CACHED,
    TAG_GIT_COMMIT,
    TAG_ORIGINAL_RUN,
    TAG_PARENT_RUN,
    TAG_RECIPE_HASH,
    TAG_RECIPE_NAME,
    TAG_STAGE,
    TAG_STAGE_HASH,
    child_runs,
    ensure_experiment,
    find_run,
    metric_key,
    open_client,
    tracking_uri,
)
from m1.types import M1Error, Pointer

__all__ = [
    "RunStatus",
    "StageRun",
    "adopt_stage",
    "finish_pipeline",
    "lineage_page",
    "link_cached_stage",
    "open_stage_run",
    "start_pipeline",
    "tracking_uri",
]


def start_pipeline(
    *,
    uri: str,
    experiment: str,
    name: str,
    recipe_hash: str,
    recipe_json: str,
    git_commit: str,
    existing_run_id: str | None = None,
) -> str:
    """Open the run of a whole pipeline, under which stages nest.

    Args:
        uri: MLflow tracking URI.
        experiment: Experiment, created where absent.
        name: Recipe's name.
        recipe_hash: Recipe's hash.
        recipe_json: The resolved recipe, kept as recipe.json.
        git_commit: Commit of the code, or "" where unknown.
        existing_run_id: Run of an earlier attempt; resumed if the store still has it.

    Returns:
        The run's id; give it to stages as MLFLOW_RUN_ID.
    """
    client = open_client(uri)
    if existing_run_id is not None and find_run(client, existing_run_id) is not None:
        client.update_run(existing_run_id, status="RUNNING")
        return existing_run_id
    tags = {
        TAG_RECIPE_HASH: recipe_hash,
        TAG_RECIPE_NAME: name,
        "mlflow.source.name": "m1 run",
    }
    if git_commit:
        tags |= {TAG_GIT_COMMIT: git_commit, "mlflow.source.git.commit": git_commit}
    experiment_id = ensure_experiment(client, experiment)
    run = client.create_run(experiment_id, run_name=f"{name}-{recipe_hash[:12]}", tags=tags)
    client.log_text(run.info.run_id, recipe_json, "recipe.json")
    return str(run.info.run_id)


def link_cached_stage(
    parent_run_id: str,
    *,
    uri: str,
    stage: str,
    stage_hash: str,
    pointer: Pointer,
    seconds: float = 0.0,
) -> str:
    """Show under this pipeline a stage that an earlier one finished.

    Args:
        parent_run_id: This pipeline's run.
        uri: MLflow tracking URI.
        stage: Name of the stage.
        stage_hash: Its hash.
        pointer: Its output; `metadata["mlflow_run_id"]` names the run that made it.
        seconds: What the stage took when it ran.

    Returns:
        Id of the nested run; the same one for the same parent and hash, however often it is called.
        Where this pipeline's own run of the stage made the output, that run.
    """
    client = open_client(uri)
    parent = find_run(client, parent_run_id)
    if parent is None:
        raise M1Error(f"The store at {uri} has no run {parent_run_id}; start the pipeline anew.")
    original_id = str(pointer.metadata.get("mlflow_run_id", ""))
    for run in child_runs(client, parent, stage_hash):
        if run.data.tags.get(TAG_CACHED) == "true" or run.info.run_id == original_id:
            return str(run.info.run_id)
    tags = {
        TAG_PARENT_RUN: parent_run_id,
        TAG_STAGE: stage,
        TAG_STAGE_HASH: stage_hash,
        TAG_CACHED: "true",
        TAG_ORIGINAL_RUN: original_id,
        "checkpoint_uri": pointer.uri,
    }
    run = client.create_run(
        parent.info.experiment_id, run_name=f"{stage}-{stage_hash[:12]} (cached)", tags=tags
    )
    run_id = str(run.info.run_id)
    original = find_run(client, original_id) if original_id else None
    if original is not None:
        _copy_links(client, original, run_id)
    client.log_metric(run_id, "original_seconds", seconds)
    client.set_terminated(run_id)
    return run_id


def adopt_stage(parent_run_id: str, *, uri: str, pointer: Pointer) -> None:
    """Put a stage's run under this pipeline's, if it was recorded alone while the server was away.

    Args:
        parent_run_id: This pipeline's run.
        uri: MLflow tracking URI.
        pointer: The stage's output.
    """
    client = open_client(uri)
    run_id = pointer.metadata.get("mlflow_run_id")
    run = find_run(client, str(run_id)) if run_id else None
    if run is not None and TAG_PARENT_RUN not in run.data.tags:
        client.set_tag(run_id, TAG_PARENT_RUN, parent_run_id)


def _copy_links(client: Any, original: Any, run_id: str) -> None:
    inputs, outputs = original.inputs, original.outputs
    if inputs and (inputs.dataset_inputs or inputs.model_inputs):
        client.log_inputs(run_id, datasets=inputs.dataset_inputs, models=inputs.model_inputs)
    if outputs and outputs.model_outputs:
        client.log_outputs(run_id, outputs.model_outputs)


def finish_pipeline(
    *,
    uri: str,
    run_id: str,
    status: RunStatus,
    summary: Mapping[str, Any],
    lineage_html: str | None = None,
    report_path: Path | None = None,
    figures: Mapping[str, str] | None = None,
) -> None:
    """Keep what the pipeline concluded on its run and end it.

    Args:
        uri: MLflow tracking URI.
        run_id: The pipeline's run.
        status: How it ended.
        summary: Contents of summary.json; mean scores become metrics `score/<benchmark>/<model>`.
        lineage_html: The page of `lineage_page`, kept as lineage.html.
        report_path: The HTML report.
        figures: SVG texts by name, kept as figures/<name>.svg.
    """
    from mlflow.entities import Metric

    client = open_client(uri)
    scores = {
        f"score/{benchmark}/{model}": float(score["mean"])
        for benchmark, row in summary.get("scores", {}).items()
        for model, score in row.items()
    }
    scores["pipeline/wall_seconds"] = float(summary.get("wall_seconds", 0.0))
    client.log_batch(run_id, [Metric(metric_key(k), v, 0, 0) for k, v in scores.items()])
    client.log_text(run_id, json.dumps(summary, indent=2), "summary.json")
    if lineage_html is not None:
        client.log_text(run_id, lineage_html, "lineage.html")
    if report_path is not None:
        client.log_artifact(run_id, str(report_path))
    for name, svg in (figures or {}).items():
        client.log_text(run_id, svg, f"figures/{name}.svg")
    client.set_terminated(run_id, status=status)
