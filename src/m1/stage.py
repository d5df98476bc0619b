"""What every stage shares: found done or resumed by its hash, recorded, its pointer written last.

A stage's folder is `<root>/stages/<stage>-<hash12>/`: `output/` (what the pointer names),
`checkpoints/` and other work in progress, `metrics.jsonl`, `warnings.jsonl`, `pointer.json`. Runs
of any recipe that need the same stage share it. With S3 it lies on a scratch disk, and what a
restart needs is kept on S3 too (`m1.stage_backup`).
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from m1.config.schema import Recipe
from m1.config.stages import parents_of, stage_hashes, stage_slice
from m1.stage_backup import backup_of
from m1.stage_context import (
    METRICS,
    PROBABILITIES,
    ROLLOUTS,
    WARNINGS,
    StageContext,
    StageOutput,
    read_metrics,
)
from m1.stage_place import alone, fetch, local_root, place, pointer_key, stage_folder
from m1.stage_records import ids_of, open_run, origin, send_pending
from m1.storage import (
    LocalStorage,
    Storage,
    disk_errors,
    folder_digest,
    open_storage,
    publish_pointer,
    read_pointer,
)
from m1.tracking.events import EventLog
from m1.tracking.outbox import QueuedRun
from m1.types import M1Error, Pointer

__all__ = [
    "METRICS",
    "PROBABILITIES",
    "ROLLOUTS",
    "WARNINGS",
    "StageBody",
    "StageContext",
    "StageOutput",
    "assist",
    "execute",
    "exit_with_launcher",
    "fetch",
    "finished",
    "local_root",
    "pointer_key",
    "read_metrics",
    "send_pending",
    "stage_folder",
]

StageBody = Callable[[StageContext, Recipe], StageOutput]


def finished(stage: str, recipe: Recipe) -> Pointer | None:
    """The pointer of a stage that is done, or None."""
    storage = open_storage(recipe.storage.root)
    stage_hash = stage_hashes(recipe)[stage]
    pointer = read_pointer(storage, pointer_key(stage, stage_hash))
    return pointer if pointer is not None and pointer.stage_hash == stage_hash else None


def execute(
    stage: str, recipe: Recipe, body: StageBody, *, inputs: Mapping[str, Pointer] | None = None
) -> Pointer:
    """Run a stage unless it is done, from where an earlier attempt stopped.

    Args:
        stage: Name in `m1.config.stages.STAGES`.
        recipe: The whole recipe; only the stage's slice is part of its hash.
        body: Does the work; may be entered again after a crash, with what it left in its folder.
        inputs: Pointers of earlier stages; absent: found by their hashes.

    Returns:
        The stage's pointer.

    Raises:
        M1Error: An input is missing or corrupt, another process runs the stage, the storage cannot
            be used, or the body met a condition that the user can mend.
    """
    events = EventLog(Path(os.environ["M1_EVENTS"]) if "M1_EVENTS" in os.environ else None)
    try:
        done = finished(stage, recipe)
        if done is not None:
            events.emit(stage, "cached", seconds=done.metadata.get("seconds", 0.0))
            return done
        exit_with_launcher()
        storage = open_storage(recipe.storage.root)
        storage.ensure_usable()
        resolved = dict(inputs) if inputs is not None else _find_inputs(stage, recipe)
        return _run(stage, recipe, body, resolved, storage, events)
    except BaseException as error:
        message = str(error) if isinstance(error, M1Error) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # nothing may take the place of the error itself
            events.emit(stage, "error", message=message)
        raise


def assist(
    stage: str, recipe: Recipe, body: StageBody, *, inputs: Mapping[str, Pointer] | None = None
) -> None:
    """A further rank's part of a stage that the first rank `execute`s: the body, and no records."""
    exit_with_launcher()
    local = local_root(recipe)
    folder = stage_folder(stage, recipe)
    storage = open_storage(recipe.storage.root)
    context = StageContext(
        name=stage,
        stage_hash=stage_hashes(recipe)[stage],
        folder=folder,
        inputs=dict(inputs) if inputs is not None else _find_inputs(stage, recipe),
        _run=None,
        events=EventLog(None),
        _fetch=lambda pointer: fetch(pointer, scratch=local),
        output_uri=storage.uri(f"{place(folder, storage)}/output"),
        _backup=backup_of(storage, folder),
    )
    body(context, recipe)


def _run(
    stage: str,
    recipe: Recipe,
    body: StageBody,
    inputs: Mapping[str, Pointer],
    storage: Storage,
    events: EventLog,
) -> Pointer:
    stage_hash = stage_hashes(recipe)[stage]
    local, folder = local_root(recipe), stage_folder(stage, recipe)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    key = pointer_key(stage, stage_hash)
    with alone(stage, folder, storage, key), disk_errors(folder):
        done = finished(stage, recipe)  # by the process that was waited for
        if done is not None:
            events.emit(stage, "cached", seconds=done.metadata.get("seconds", 0.0))
            return done
        started = time.time()
        events.emit(stage, "start")
        run, backup = open_run(stage, recipe), backup_of(storage, folder)
        context = StageContext(
            name=stage,
            stage_hash=stage_hash,
            folder=folder,
            inputs=inputs,
            _run=run,
            events=events,
            _fetch=lambda pointer: fetch(pointer, scratch=local),
            output_uri=storage.uri(f"{place(folder, storage)}/output"),
            _backup=backup,
        )
        status = "FAILED"
        try:
            _log_inputs(run, recipe, stage, inputs)
            output = body(context, recipe)
            pointer = _finish(context, recipe, output, storage, round(time.time() - started, 3))
            status = "FINISHED"
        except Exception:
            if backup is not None:  # this disk may end with the process
                for error in backup.close():
                    context.warn(error)
            raise
        finally:
            run.close(status)  # type: ignore[arg-type]
        pointer.metadata.update(ids_of(run))
        kept = publish_pointer(storage, key, pointer)
        if kept != pointer and not isinstance(storage, LocalStorage):
            # Another machine was first; what both computed lies there.
            storage.remove_folder(place(folder, storage))
        if backup is not None:
            backup.clear()
        events.emit(stage, "end", seconds=kept.metadata["seconds"])
        return kept


def _finish(
    context: StageContext, recipe: Recipe, output: StageOutput, storage: Storage, seconds: float
) -> Pointer:
    key = place(context.folder, storage)
    digest = folder_digest(context.output)
    if not isinstance(storage, LocalStorage):
        storage.upload_folder(context.output, f"{key}/output")
        metrics = context.folder / METRICS
        if metrics.exists():
            storage.upload_file(metrics, f"{key}/{METRICS}")
        if (context.folder / ROLLOUTS).is_dir():
            storage.upload_folder(context.folder / ROLLOUTS, f"{key}/{ROLLOUTS}")
    uri = storage.uri(f"{key}/output")
    datasets = {name: folder_digest(context.output / name) for name in output.datasets}
    metadata = {
        **output.metadata,
        "seconds": seconds,
        "lineage": origin(context.name, recipe, context.inputs, datasets),
    }
    for name, its_digest in datasets.items():
        context.run.log_dataset(
            name,
            source_uri=f"{uri}/{name}",
            digest=its_digest,
            context="output",
        )
    if output.is_model:
        parent = _parent_model(context.inputs)
        context.run.log_output_model(
            f"{context.name}-checkpoint",
            checkpoint_uri=uri,
            step=output.step or 0,
            parent_model_id=parent,
        )
    return Pointer(
        stage=context.name,
        stage_hash=context.stage_hash,
        uri=uri,
        digest=digest,
        step=output.step,
        metadata=metadata,
    )


def _find_inputs(stage: str, recipe: Recipe) -> dict[str, Pointer]:
    found = {parent: finished(parent, recipe) for parent in parents_of(stage, recipe)}
    missing = [parent for parent, pointer in found.items() if pointer is None]
    if missing:
        raise M1Error(
            f"stage {stage} needs the results of {', '.join(missing)}, which are not in "
            f"{recipe.storage.root}; run `m1 stage {missing[0]} RECIPE` first, or "
            "the whole recipe with `m1 run RECIPE`"
        )
    return {parent: pointer for parent, pointer in found.items() if pointer is not None}


def _parent_model(inputs: Mapping[str, Pointer]) -> str | None:
    ids = [p.metadata["model_id"] for p in inputs.values() if "model_id" in p.metadata]
    return ids[-1] if ids else None


def _log_inputs(run: QueuedRun, recipe: Recipe, stage: str, inputs: Mapping[str, Pointer]) -> None:
    run.log_params(stage_slice(stage, recipe))
    if "data" in inputs:
        data = inputs["data"]
        run.log_dataset("data", source_uri=data.uri, digest=data.digest, context="training")
    for pointer in inputs.values():
        if "model_id" in pointer.metadata:
            run.log_input_model(pointer.metadata["model_id"])


def exit_with_launcher() -> None:
    """End this process when the launcher named in M1_LAUNCHER_PID dies, even by SIGKILL."""
    pid = os.environ.get("M1_LAUNCHER_PID")
    if pid is None:
        return
    try:
        launcher = psutil.Process(int(pid))
    except psutil.NoSuchProcess:
        os._exit(1)

    def watch() -> None:
        while launcher.is_running():
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
