"""Sharded checkpoints by megatron-core's dist_checkpointing: complete or absent, and verified.

A checkpoint is written under a hidden name, its files' digests go into `complete.json`, and only
then it gets its name. A crash leaves the previous checkpoint as it was.
"""

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException

from m1.model.cpu import single_threaded
from m1.model.fitting import does_not_fit, drop_absent_scales, require_same_tensors
from m1.model.moments import METADATA, allocate_moments, load_moments, moments, num_updates
from m1.storage import disk_errors
from m1.types import M1Error

MARKER = "complete.json"


def save(
    folder: Path, model: MegatronModule, optimizer: MegatronOptimizer, state: dict[str, Any]
) -> str:
    """Write a checkpoint at `folder`, which appears only when whole.

    Args:
        folder: Must not exist.
        model: The bare model.
        optimizer: Its optimizer.
        state: JSON-like values of the stage (step, cursor, ...).

    Returns:
        The checkpoint's digest, sha256 over its manifest.

    Raises:
        M1Error: The disk is full or not writable; earlier checkpoints are intact.
    """
    allocate_moments(optimizer)
    sharded = model.sharded_state_dict(metadata=METADATA)
    return _write(
        folder,
        {
            "model": sharded,
            "optimizer": moments(optimizer, sharded, is_loading=False),
            "num_updates": num_updates(optimizer),
            "state": state,
        },
    )


def save_weights(folder: Path, model: MegatronModule) -> str:
    """Write only the model's weights at `folder`, for `load_weights`; returns the digest."""
    return _write(folder, {"model": sharded_weights(model)})


def sharded_weights(model: MegatronModule) -> dict[str, Any]:
    """Every parameter's place in the global model, by name, as a checkpoint of weights has it."""
    return model.sharded_state_dict(metadata=METADATA)  # type: ignore[no-any-return]


def require_absent(folder: Path) -> None:
    """Raise if there is something where a checkpoint is to be written."""
    if folder.exists():
        raise M1Error(
            f"{folder} exists already; a checkpoint is never overwritten. Delete it first"
        )


def _write(folder: Path, full: dict[str, Any]) -> str:
    require_absent(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    is_writer = dist.get_rank() == 0
    if is_writer:
        shutil.rmtree(partial, ignore_errors=True)
        with disk_errors(folder.parent):
            partial.mkdir(parents=True)
    dist.barrier()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    try:
        with disk_errors(folder.parent), _quiet(), single_threaded(), _ordinary_exceptions():
            dist_checkpointing.save(full, str(partial), strategy)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    digest = ""
    if is_writer:
        with disk_errors(folder.parent):
            digest = complete(partial, folder)
    dist.barrier()
    return digest


def load(folder: Path, model: MegatronModule, optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Read model and optimizer in place; returns the saved `state`.

    Raises:
        M1Error: A file is missing or its content changed since it was written.
    """
    verify(folder)
    sharded = model.sharded_state_dict(metadata=METADATA)
    full = {"model": sharded, "optimizer": moments(optimizer, sharded, is_loading=True)}
    loaded = _read(folder, full)
    model.load_state_dict(loaded["model"])
    load_moments(optimizer, loaded["optimizer"], loaded["num_updates"])
    return loaded["state"]  # type: ignore[no-any-return]


def load_weights(folder: Path, model: MegatronModule) -> None:
    """Read only the model's weights in place.

    Raises:
        M1Error: A file is missing or its content changed since it was written.
    """
    verify(folder)
    loaded = _read(folder, {"model": sharded_weights(model)})
    model.load_state_dict(loaded["model"])


def _read(folder: Path, full: dict[str, Any]) -> dict[str, Any]:
    require_same_tensors(full["model"], folder)
    try:
        with _quiet(), single_threaded(), _ordinary_exceptions():
            absent = drop_absent_scales(full["model"], folder)
            loaded: dict[str, Any] = dist_checkpointing.load(full, str(folder))
            loaded["model"] |= {key: torch.empty(0, dtype=torch.uint8) for key in absent}
            return loaded
    except CheckpointingException as error:
        raise M1Error(does_not_fit(folder, str(error))) from error


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its digest.

    Raises:
        M1Error: Names the file that is missing or differs.
    """
    marker = folder / MARKER
    if not marker.exists():
        raise M1Error(
            f"{folder} is not a complete checkpoint: it has no {MARKER}; delete the folder and "
            "run again"
        )
    try:
        files = json.loads(marker.read_text())["files"]
    except (ValueError, KeyError):
        raise M1Error(
            f"checkpoint {folder} is corrupt: {MARKER} cannot be read. Delete that folder to go on "
            "from the checkpoint before it (or from the stage's start); nothing else was touched"
        ) from None
    for name, expected in files.items():
        path = folder / name
        if not path.exists() or _sha256(path) != expected:
            what = (
                "is missing" if not path.exists() else "does not have the content that was written"
            )
            raise M1Error(
                f"checkpoint {folder} is corrupt: {name} {what}. Delete that folder to go on from "
                "the checkpoint before it (or from the stage's start); nothing else was touched"
            )


def latest(parent: Path) -> Path | None:
    """The complete checkpoint with the highest step below `parent`."""
    found = sorted(p for p in parent.glob("step_*") if (p / MARKER).exists())
    return found[-1] if found else None


def step_folder(parent: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies; names sort by step."""
    return parent / f"step_{step:08d}"


def prune(parent: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and leftovers of interrupted writes."""
    found = sorted(p for p in parent.glob("step_*") if (p / MARKER).exists())
    for path in [*found[:-keep], *parent.glob(".step_*.partial")]:
        shutil.rmtree(path, ignore_errors=True)


def complete(partial: Path, folder: Path) -> str:
    """Note the digest of every file of a written checkpoint and give it its name.

    Returns:
        The checkpoint's digest, sha256 over its manifest.
    """
    files = {
        str(path.relative_to(partial)): _sha256(path)
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    manifest = json.dumps({"files": files}, indent=1, sort_keys=True)
    with (partial / MARKER).open("w") as out:
        out.write(manifest)
        out.flush()
        os.fsync(out.fileno())
    partial.rename(folder)
    return hashlib.sha256(manifest.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _ordinary_exceptions() -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:  # torch derives it from BaseException
        raise RuntimeError(str(error)) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence notices that megatron and torch repeat at every checkpoint."""
    logger = logging.getLogger("megatron.core")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
