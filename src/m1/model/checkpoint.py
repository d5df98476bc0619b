"""Sharded checkpoints by megatron-core's dist_checkpointing: complete or absent, and verified."""

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule

from m1.model.cpu import single_threaded
from m1.model.fitting import does_not_fit, drop_absent_scales, require_same_tensors
from m1.model.moments import METADATA, allocate_moments, load_moments, moments, num_updates
from m1.model.quiet import ordinary_exceptions, quiet
from m1.model.saving import MARKER, Saving, sha256
from m1.types import M1Error


def save(
    folder: Path,
    model: MegatronModule,
    optimizer: MegatronOptimizer,
    state: dict[str, Any],
    *,
    in_background: bool = False,
) -> Saving:
    """Begin a checkpoint at `folder`, which appears only when whole: call `finish` on the result.

    Args:
        folder: Must not exist.
        model: The bare model.
        optimizer: Its optimizer.
        state: JSON-like values of the stage (step, cursor, ...).
        in_background: Whether a thread writes the files; model and optimizer may change meanwhile.

    Raises:
        M1Error: The disk is full or not writable; earlier checkpoints are intact.
    """
    allocate_moments(optimizer)
    sharded = model.sharded_state_dict(metadata=METADATA)
    content = {
        "model": sharded,
        "optimizer": moments(optimizer, sharded, is_loading=False),
        "num_updates": num_updates(optimizer),
        "state": state,
    }
    return Saving(folder, content, in_background=in_background)


def save_weights(folder: Path, model: MegatronModule) -> str:
    """Write only the model's weights at `folder`, for `load_weights`; returns the digest."""
    return Saving(folder, {"model": sharded_weights(model)}, in_background=False).finish()


def sharded_weights(model: MegatronModule) -> dict[str, Any]:
    """Every parameter's place in the global model, by name, as a checkpoint of weights has it."""
    return model.sharded_state_dict(metadata=METADATA)  # type: ignore[no-any-return]


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
        with quiet(), single_threaded(), ordinary_exceptions():
            absent = drop_absent_scales(full["model"], folder)
            loaded: dict[str, Any] = dist_checkpointing.load(full, str(folder))
            loaded["model"] |= {key: torch.empty(0, dtype=torch.uint8) for key in absent}
            return loaded
    except CheckpointingException as error:
        raise M1Error(does_not_fit(folder, str(error))) from error


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its digest; each rank of a run checks its share.

    Raises:
        M1Error: Names the file that is missing or differs; on every rank.
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
        raise M1Error(_corrupt(folder, f"{MARKER} cannot be read")) from None
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    wrong = [_wrong(folder / name, files[name]) for name in sorted(files)[rank::size]]
    found = [text for text in wrong if text is not None][:1]
    if size > 1:
        gathered: list[Any] = [None] * size
        dist.all_gather_object(gathered, found)
        found = [text for texts in gathered for text in texts]
    if found:
        raise M1Error(_corrupt(folder, found[0]))


def _wrong(path: Path, expected: str) -> str | None:
    if not path.exists():
        return f"{path.name} is missing"
    if sha256(path) != expected:
        return f"{path.name} does not have the content that was written"
    return None


def _corrupt(folder: Path, what: str) -> str:
    return (
        f"checkpoint {folder} is corrupt: {what}. Delete that folder to go on from the checkpoint "
        "before it (or from the stage's start); nothing else was touched"
    )


def inside(folder: Path) -> Path:
    """The complete checkpoint that `folder` is, or holds as `checkpoint`.

    Raises:
        M1Error: It is and holds none.
    """
    for path in (folder, folder / "checkpoint"):
        if (path / MARKER).exists():
            return path
    raise M1Error(
        f"{folder} neither is nor holds a checkpoint ({MARKER}); name the folder of one, and make "
        "one from a Hugging Face model with `m1 convert`"
    )


def latest(parent: Path) -> Path | None:
    """The complete checkpoint with the highest step below `parent`."""
    found = sorted(p for p in parent.glob("step_*") if (p / MARKER).exists())
    return found[-1] if found else None


def step_folder(parent: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies; names sort by step."""
    return parent / f"step_{step:08d}"


def prune(parent: Path, *, keep: int, needed: Collection[Path] = ()) -> None:
    """Remove all but the newest `keep` checkpoints, and leftovers of interrupted writes.

    Those that are `needed` stay, until another call.

    Among several ranks the first one does it.
    """
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    found = sorted(p for p in parent.glob("step_*") if (p / MARKER).exists())
    old = [path for path in found[:-keep] if path not in needed]
    for path in [*old, *parent.glob(".step_*.partial")]:
        shutil.rmtree(path, ignore_errors=True)
