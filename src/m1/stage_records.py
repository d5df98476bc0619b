"""A stage's lineage record: its run in MLflow, and what is sent later."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from m1.config.schema import Recipe
from m1.config.stages import canonical_json, image_digest, stage_hashes, stage_slice
from m1.stage_place import local_root, pointer_key, stage_folder
from m1.storage import open_storage, read_pointer, write_pointer
from m1.tracking.lineage import open_stage_run, tracking_uri
from m1.tracking.outbox import QueuedRun, journals, read_journal
from m1.tracking.store import TAG_GIT_COMMIT, StoreAway, short_digest, without_secret
from m1.types import Pointer


def origin(
    stage: str, recipe: Recipe, inputs: Mapping[str, Pointer], datasets: Mapping[str, str]
) -> dict[str, Any]:
    """What a pointer says of where its output came from.

    Args:
        stage: Name of the stage.
        recipe: The whole recipe.
        inputs: Pointers that it read.
        datasets: Digests of the datasets it made, by name; with these MLflow names datasets.

    Returns:
        `inputs` (uri, digest, stage hash, model by stage), `code` (commit), `image` (its digest, or
        that of the sources), `container` (the recipe's image, in a cluster), `config` (sha256 of
        the stage's slice of the recipe), `datasets`.
    """
    read = {
        name: {
            "uri": pointer.uri,
            "digest": pointer.digest,
            "stage_hash": pointer.stage_hash,
            **({"model_id": m} if (m := pointer.metadata.get("model_id")) else {}),
        }
        for name, pointer in inputs.items()
    }
    config = canonical_json(stage_slice(stage, recipe)).encode()
    return {
        "inputs": read,
        "code": os.environ.get("M1_GIT_COMMIT", ""),
        "image": image_digest(),
        "container": recipe.image if "KUBERNETES_SERVICE_HOST" in os.environ else "",
        "config": hashlib.sha256(config).hexdigest(),
        "datasets": {name: short_digest(digest) for name, digest in datasets.items()},
    }


def open_run(stage: str, recipe: Recipe) -> QueuedRun:
    """The stage's MLflow run, which waits on disk while a server is away."""
    uri = tracking_uri(recipe.tracking, local_root(recipe))
    stage_hash = stage_hashes(recipe)[stage]
    storage = open_storage(recipe.storage.root)
    tags = {
        "m1.image": image_digest(),
        "m1.pointer_uri": storage.uri(pointer_key(stage, stage_hash)),
    }
    if os.environ.get("M1_GIT_COMMIT"):
        tags[TAG_GIT_COMMIT] = os.environ["M1_GIT_COMMIT"]
    opener = partial(
        open_stage_run,
        uri=uri,
        experiment=recipe.tracking.experiment,
        stage=stage,
        stage_hash=stage_hash,
        tags=tags,
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
        calls = read_journal(journal)
        run = QueuedRun(uri, opener, journal.parent, pointer.stage_hash, journal=calls)
        if not run.is_delivered:
            raise StoreAway(f"the MLflow server at {without_secret(uri)} does not answer")
        known = {**pointer.metadata, **ids_of(run)}
        write_pointer(storage, key, replace(pointer, metadata=known))
        sent.append(pointer.stage)
    return sent
