"""`m1 run`: the recipe's pipeline on this machine, its display, report, summary and lineage."""

import importlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from m1.conclusion import conclude, git_commit, open_parent
from m1.config.loading import recipe_json
from m1.config.schema import Recipe
from m1.config.stages import image_digest, recipe_hash, stages_of
from m1.launch import project_root, run_stage
from m1.stage import local_root
from m1.storage import atomic_write, disk_errors, open_storage
from m1.tracking.display import PipelineDisplay, print_summary
from m1.tracking.events import read_events
from m1.tracking.lineage import tracking_uri
from m1.tracking.store import without_secret
from m1.types import M1Error, Pointer


def run_pipeline(recipe: Recipe, *, console: Console) -> dict[str, Any]:
    """Run every stage that is not done, then write report, summary and lineage.

    Returns:
        The run's summary.

    Raises:
        M1Error: A stage failed; its message, and what was complete stays complete.
    """
    started = time.time()
    open_storage(recipe.storage.root).ensure_usable()
    local = load_pipelines("local")
    folder = run_folder(recipe)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "recipe.json", recipe_json(recipe).encode())
    events = folder / "events.jsonl"
    atomic_write(events, b"")
    uri = tracking_uri(recipe.tracking, local_root(recipe))
    parent = open_parent(recipe, folder, uri, console)
    environment = {
        "M1_EVENTS": str(events.absolute()),
        "M1_LAUNCHER_PID": str(os.getpid()),
        # Sources edited during the run must not change its hashes.
        "M1_IMAGE_DIGEST": image_digest(),
        "M1_GIT_COMMIT": git_commit(),
        "MLFLOW_TRACKING_URI": uri,
        "PYTHONWARNINGS": "ignore",
        **({"MLFLOW_RUN_ID": parent} if parent else {}),
    }
    saved = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    failure: BaseException | None = None
    try:
        with PipelineDisplay(stages_of(recipe), events, console):
            local.run_locally(recipe, pipeline_root=folder / "kfp", log=folder / "pipeline.log")
    except (RuntimeError, KeyboardInterrupt) as error:
        failure = error
    finally:
        _restore_environment(saved)
    outcome = conclude(
        recipe, folder, uri=uri, parent=parent, started=started, failure=failure, console=console
    )
    print_summary(
        console, outcome, report_path=folder / "report.html", lineage_uri=without_secret(uri)
    )
    if isinstance(failure, KeyboardInterrupt):
        raise failure
    if failure is not None:
        raise M1Error(_failure_message(events, folder)) from failure
    return outcome


def run_single_stage(name: str, recipe: Recipe, *, console: Console) -> Pointer:
    """Run one stage in this process and say where its output is."""
    folder = run_folder(recipe)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    events = folder / "events.jsonl"
    os.environ["M1_EVENTS"] = str(events.absolute())
    os.environ.setdefault("M1_GIT_COMMIT", git_commit())
    with PipelineDisplay([name], events, console):
        pointer = run_stage(name, recipe)
    console.print(f"{name} {pointer.stage_hash[:12]}: {pointer.uri}", soft_wrap=True)
    return pointer


def load_pipelines(module: str) -> ModuleType:
    """Import a module of the project's `pipelines` folder, which is not in the wheel.

    Raises:
        M1Error: KFP is not installed, or there is no project here.
    """
    root = str(project_root())
    if root not in sys.path:
        sys.path.insert(0, root)
    try:
        return importlib.import_module(f"pipelines.{module}")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("kfp"):
            raise
        raise M1Error("running a pipeline needs KFP; pip install 'm1[pipelines]'") from error


def run_folder(recipe: Recipe) -> Path:
    """Folder of this recipe's run."""
    return local_root(recipe) / f"{recipe.name}-{recipe_hash(recipe)[:12]}"


def _failure_message(events: Path, folder: Path) -> str:
    for event in reversed(read_events(events)[0]):
        if event["event"] == "error":
            return f"stage {event['stage']} failed: {event['message']}"
    return f"the pipeline stopped without a message; see the end of {folder / 'pipeline.log'}"


def _restore_environment(saved: Mapping[str, str | None]) -> None:
    for name, value in saved.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
