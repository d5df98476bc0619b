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
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from m1.model.cpu import single_threaded
from m1.storage import disk_errors
from m1.types import M1Error

MARKER = "complete.json"
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "non_homogeneous_layers": True,
    "singleton_local_shards": False,
}


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
    _allocate_moments(optimizer)
    sharded = model.sharded_state_dict(metadata=_METADATA)
    return _write(
        folder,
        {
            "model": sharded,
            "optimizer": _moments(optimizer, sharded, is_loading=False),
            "num_updates": _num_updates(optimizer),
            "state": state,
        },
    )


def _parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The optimizers of dense and of expert parameters; one without expert parallel ranks."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _moments(
    optimizer: MegatronOptimizer, sharded: dict[str, Any], *, is_loading: bool
) -> dict[str, Any]:
    """Main weights and moments of every parameter, with their places in the global model.

    megatron's own state dict of several optimizers can be read by as many optimizers only, and so
    under the same kind of layout; the tensors alone are named after the model's parameters.
    """
    return {
        str(number): part.sharded_state_dict(sharded, is_loading=is_loading, metadata=_METADATA)[
            "param_state"
        ]
        for number, part in enumerate(_parts(optimizer))
    }


def _num_updates(optimizer: MegatronOptimizer) -> int:
    groups = [group for part in _parts(optimizer) for group in part.optimizer.param_groups]
    return max((int(group.get("step", 0)) for group in groups), default=0)


def _load_moments(optimizer: MegatronOptimizer, moments: dict[str, Any], num_updates: int) -> None:
    for number, part in enumerate(_parts(optimizer)):
        own = part.state_dict()
        for group in own["optimizer"]["param_groups"]:
            group["step"] = num_updates
        own["param_state"] = moments[str(number)]
        own["param_state_sharding_type"] = _METADATA["distrib_optim_sharding_type"]
        part.load_state_dict(own)


def _allocate_moments(optimizer: MegatronOptimizer) -> None:
    """Moments of zero for what has not been updated yet; saving asks for them."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(parameter))


def save_weights(folder: Path, model: MegatronModule) -> str:
    """Write only the model's weights at `folder`, for `load_weights`; returns the digest."""
    return _write(folder, {"model": sharded_weights(model)})


def sharded_weights(model: MegatronModule) -> dict[str, Any]:
    """Every parameter's place in the global model, by name, as a checkpoint of weights has it."""
    return model.sharded_state_dict(metadata=_METADATA)  # type: ignore[no-any-return]


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
    sharded = model.sharded_state_dict(metadata=_METADATA)
    full = {"model": sharded, "optimizer": _moments(optimizer, sharded, is_loading=True)}
    loaded = _read(folder, full)
    model.load_state_dict(loaded["model"])
    _load_moments(optimizer, loaded["optimizer"], loaded["num_updates"])
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
    try:
        with _quiet(), single_threaded():
            absent = _drop_absent_scales(full["model"], folder)
            loaded: dict[str, Any] = dist_checkpointing.load(full, str(folder))
            loaded["model"] |= {key: torch.empty(0, dtype=torch.uint8) for key in absent}
            return loaded
    except CheckpointingException as error:
        raise M1Error(
            f"checkpoint {folder} does not fit this [model]: {error}. Use the [model] table that "
            "made it, or start the stage anew in another storage.root"
        ) from error


def _drop_absent_scales(model: dict[str, Any], folder: Path) -> list[str]:
    """Take FP8 scaling state that the checkpoint lacks out of what is asked for; returns its keys.

    Transformer Engine's modules ask for it; megatron's own, which may have written the checkpoint,
    have none. It then starts afresh.
    """
    asked = [key for key in model if key.endswith("_extra_state")]
    if not asked:
        return []
    present = FileSystemReader(folder).read_metadata().state_dict_metadata
    absent = [key for key in asked if getattr(model[key], "unique_key", None) not in present]
    for key in absent:
        del model[key]
    return absent


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
