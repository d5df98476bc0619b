"""Whether a checkpoint is of the model that asks for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from m1.types import M1Error


def does_not_fit(folder: Path, reason: str) -> str:
    """The message about a checkpoint of another model."""
    return (
        f"checkpoint {folder} is not of this [model]: {reason}. Use the [model] table that made "
        "it, or start the stage anew in another storage.root"
    )


def require_same_tensors(model: dict[str, Any], folder: Path) -> None:
    """Raise unless checkpoint and model, over all ranks, have the same weights of the same shapes.

    Left to itself, megatron reads a part of a deeper model and cuts or fills a vocabulary.
    """
    stored = {
        name: tuple(entry.size)
        for name, entry in FileSystemReader(folder).read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
    }
    asked = {tensor.key: tuple(tensor.global_shape) for tensor in _sharded_tensors(model)}
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, asked)
    asked = {name: shape for part in everywhere for name, shape in part.items()}
    differences = [
        f"{name} has shape {list(stored[name])} there and {list(shape)} in the model"
        for name, shape in asked.items()
        if name in stored and stored[name] != shape
    ]
    differences += [f"it lacks {name}" for name in sorted(asked.keys() - stored.keys())]
    differences += [f"the model lacks {name}" for name in sorted(stored.keys() - asked.keys())]
    if differences:
        rest = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise M1Error(does_not_fit(folder, "; ".join(differences[:3]) + rest))


def _sharded_tensors(state: Any) -> Iterator[ShardedTensor]:
    if isinstance(state, ShardedTensorFactory):
        yield from _sharded_tensors(state.build())
    elif isinstance(state, ShardedTensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _sharded_tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _sharded_tensors(value)


def drop_absent_scales(model: dict[str, Any], folder: Path) -> list[str]:
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
