"""A stage's lineage record: its run in MLflow, and what is sent later."""

from dataclasses import replace
from functools import partial
from typing import Any

from m1.config.schema import Recipe
from m1.config.stages import stage_hashes
from m1.stage_place import local_root, stage_folder
from m1.storage import open_storage, read_pointer, write_pointer
from m1.tracking.lineage import open_stage_run, tracking_uri
from m1.tracking.outbox import QueuedRun, journals, read_journal


def open_run(stage: str, recipe: Recipe) -> QueuedRun:
    """The stage's MLflow run, which waits on disk while a server is away."""
    uri = tracking_uri(recipe.tracking, local_root(recipe))
    stage_hash = stage_hashes(recipe)[stage]
    opener = partial(
        open_stage_run,
        uri=uri,
        experiment=recipe.tracking.experiment,
        stage=stage,
        stage_hash=stage_hash,
    )
    return QueuedRun(uri, opener, stage_folder(stage, recipe), stage_hash)


def ids_of(run: QueuedRun) -> dict[str, Any]:
    """What a pointer says of MLflow, as far as it is known."""
    return {
        "mlflow_run_id": run.run_id,
        **({"model_id": run.model_id} if run.model_id is not None else {}),
    }


def send_pending(recipe: Recipe) -> list[str]:
    """Offer MLflow the records that it did not take, and put its ids into their pointers.

    Returns:
        Names of the stages that were sent.

    Raises:
        StoreAway: The server still does not answer; what was not sent stays.
    """
    storage, sent = open_storage(recipe.storage.root), []
    for journal in journals(local_root(recipe)):
        key = f"stages/{journal.parent.name}/pointer.json"
        pointer = read_pointer(storage, key)
        if pointer is None:
            continue  # the stage goes on some day, and sends its own
        uri = tracking_uri(recipe.tracking, local_root(recipe))
        opener = partial(
            open_stage_run,
            uri=uri,
            experiment=recipe.tracking.experiment,
            stage=pointer.stage,
            stage_hash=pointer.stage_hash,
        )
        run = QueuedRun(uri, opener, journal.parent, pointer.stage_hash)
        run.replay(read_journal(journal) if journal.exists() else [])
        known = {**pointer.metadata, **ids_of(run)}
        write_pointer(storage, key, replace(pointer, metadata=known))
        sent.append(pointer.stage)
    return sent
