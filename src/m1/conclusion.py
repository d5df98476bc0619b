"""What a pipeline's run leaves: summary, report and lineage page, in files and in MLflow."""

import json
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from m1.config.loading import recipe_json
from m1.config.schema import Recipe
from m1.config.stages import recipe_hash, stage_hashes, stage_kind, stages_of
from m1.launch import finished_stages, project_root
from m1.stage import (
    METRICS,
    PROBABILITIES,
    ROLLOUTS,
    local_root,
    pointer_key,
    read_metrics,
    send_pending,
)
from m1.storage import atomic_write
from m1.tracking.events import read_events
from m1.tracking.lineage import tracking_uri
from m1.tracking.store import is_away, without_secret
from m1.types import M1Error, Pointer


def conclude(
    recipe: Recipe,
    folder: Path,
    *,
    uri: str,
    parent: str,
    started: float,
    failure: BaseException | None,
    console: Console,
) -> dict[str, Any]:
    """Write summary.json, report.html and the lineage page, and end the MLflow run.

    While the MLflow server is away the files are written all the same.
    """
    from m1.evaluate.figures import joined_stages, render_figures
    from m1.evaluate.report import sample_rollouts, write_report
    from m1.tracking.lineage import lineage_page

    sent = _deliver(recipe, console)
    parent = parent or (open_parent(recipe, folder, uri, console) if sent else "")

    pointers = finished_stages(recipe)
    summary = summarize(recipe, folder, pointers, wall_seconds=time.time() - started)
    report = folder / "report.html"
    metrics = {s: read_metrics(_stage_folder(recipe, p) / METRICS) for s, p in pointers.items()}
    reinforced = [pointer for s, pointer in pointers.items() if stage_kind(s) == "rl"]
    probabilities = _read_json(
        _stage_folder(recipe, reinforced[-1]) / PROBABILITIES if reinforced else None
    )
    figures = render_figures(joined_stages(metrics), summary["scores"], probabilities)
    write_report(
        report,
        summary=summary,
        card=pointers["data"].metadata.get("card") if "data" in pointers else None,
        figures=figures,
        probabilities=probabilities,
        recipe_json=recipe_json(recipe),
        pointers=pointers,
        rollouts=sample_rollouts(_stage_folder(recipe, reinforced[-1]) / ROLLOUTS)
        if reinforced
        else (),
    )
    atomic_write(folder / "summary.json", json.dumps(summary, indent=2).encode())
    page = lineage_page(pointers, summary=summary, tracking=without_secret(uri), run_id=parent)
    atomic_write(folder / "lineage.html", page.encode())
    if parent:
        facts = {"lineage_html": page, "report_path": report, "figures": figures}
        _record(parent, uri, pointers, summary, failure, facts, console)
    _point_latest(folder)
    return summary


def _record(
    parent: str,
    uri: str,
    pointers: Mapping[str, Pointer],
    summary: Mapping[str, Any],
    failure: BaseException | None,
    facts: Mapping[str, Any],
    console: Console,
) -> None:
    """Put stages and conclusion under the pipeline's run, unless the server is away."""
    from m1.tracking.lineage import adopt_stage, finish_pipeline, link_cached_stage

    try:
        for stage, pointer in pointers.items():
            adopt_stage(parent, uri=uri, pointer=pointer)
            if summary["stages"][stage]["status"] == "cached":
                link_cached_stage(
                    parent,
                    uri=uri,
                    stage=stage,
                    stage_hash=pointer.stage_hash,
                    pointer=pointer,
                    seconds=summary["stages"][stage]["seconds"],
                )
        finish_pipeline(
            uri=uri,
            run_id=parent,
            status="FINISHED" if failure is None else "FAILED",
            summary=summary,
            **facts,
        )
    except Exception as error:
        if not is_away(error, uri):
            raise
        _say_away(console)


def _deliver(recipe: Recipe, console: Console) -> bool:
    """Send what stages kept while the MLflow server was away; whether none is left."""
    try:
        send_pending(recipe)
    except Exception as error:
        if not is_away(error, tracking_uri(recipe.tracking, local_root(recipe))):
            raise
        _say_away(console)
        return False
    return True


def _say_away(console: Console) -> None:
    console.print(
        "[yellow]MLflow does not answer; records wait in the run's folder, and the next m1 run "
        "delivers them.[/]",
        soft_wrap=True,
    )


def summarize(
    recipe: Recipe, folder: Path, pointers: Mapping[str, Pointer], *, wall_seconds: float
) -> dict[str, Any]:
    """The run's summary.json."""
    hashes = stage_hashes(recipe)
    statuses = _statuses(folder / "events.jsonl", list(hashes))
    evaluated = pointers.get("evaluate")
    return {
        "recipe": recipe.name,
        "recipe_hash": recipe_hash(recipe),
        "git_commit": git_commit(),
        "wall_seconds": round(wall_seconds, 1),
        "stages": {
            stage: {
                "hash": stage_hash,
                "status": statuses[stage],
                "seconds": pointers[stage].metadata.get("seconds", 0.0)
                if stage in pointers
                else 0.0,
                "outputs": _outputs(pointers.get(stage)),
            }
            for stage, stage_hash in hashes.items()
        },
        "scores": _ordered(evaluated.metadata["scores"], recipe) if evaluated is not None else {},
    }


def _ordered(scores: Mapping[str, Mapping[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """Benchmarks as in the recipe, models in the order of their stages."""
    names = [b.name for b in recipe.evaluate.benchmarks] if recipe.evaluate else []
    return {b: {s: scores[b][s] for s in stages_of(recipe) if s in scores[b]} for b in names}


def git_commit() -> str:
    """Commit of the checkout, marked `-dirty` when it has changes; empty outside one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, cwd=project_root(), timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired, M1Error):
        return ""
    return found.stdout.strip()


def open_parent(recipe: Recipe, folder: Path, uri: str, console: Console) -> str:
    """Id of the pipeline's MLflow run; empty while the server is away."""
    try:
        return _opened_parent(recipe, folder, uri)
    except Exception as error:
        if not is_away(error, uri):
            raise
        _say_away(console)
        return ""


def _opened_parent(recipe: Recipe, folder: Path, uri: str) -> str:
    from m1.tracking.lineage import start_pipeline

    record = folder / "run.json"
    previous = (_read_json(record) or {}).get("mlflow_run_id")
    parent = start_pipeline(
        uri=uri,
        experiment=recipe.tracking.experiment,
        name=recipe.name,
        recipe_hash=recipe_hash(recipe),
        recipe_json=recipe_json(recipe),
        git_commit=git_commit(),
        existing_run_id=previous,
    )
    atomic_write(
        record, json.dumps({"mlflow_run_id": parent, "tracking_uri": without_secret(uri)}).encode()
    )
    return parent


def _statuses(events: Path, stages: list[str]) -> dict[str, str]:
    words = {"end": "done", "cached": "cached", "error": "failed", "start": "failed"}
    found = dict.fromkeys(stages, "waiting")
    for event in read_events(events)[0]:
        if event["event"] in words and event["stage"] in found:
            found[event["stage"]] = words[event["event"]]
    return found


def _outputs(pointer: Pointer | None) -> dict[str, Any]:
    if pointer is None:
        return {}
    kept = ("model_id", "model_name", "version", "alias", "hf_uri", "mlflow_run_id")
    facts = {name: pointer.metadata[name] for name in kept if name in pointer.metadata}
    return {"uri": pointer.uri, "digest": pointer.digest, "step": pointer.step, **facts}


def _stage_folder(recipe: Recipe, pointer: Pointer) -> Path:
    """Folder on this machine where the stage worked; empty of files when it ran elsewhere."""
    return local_root(recipe) / Path(pointer_key(pointer.stage, pointer.stage_hash)).parent


def _read_json(path: Path | None) -> Any:
    return json.loads(path.read_text()) if path is not None and path.exists() else None


def _point_latest(folder: Path) -> None:
    link = folder.parent / f".latest-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(folder.parent / "latest")
