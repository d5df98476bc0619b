"""The parts of a model that a checkpoint stores one by one, without the model in memory.

Where a parameter lies in the global model is asked of a skeleton: the model on torch's meta device,
which has shapes and no values. A chunk is a slab of a global tensor, the gate or the up projection
of one expert for example.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule

from m1.config.schema import ModelConfig
from m1.model.build import build_model


def skeleton(config: ModelConfig) -> MegatronModule:
    """The model without values. Requires `m1.model.parallel.initialize` and `vocab_size`."""
    vocab_size = config.vocab_size
    assert vocab_size is not None
    config = config.model_copy(update={"precision": "fp32"})  # stored alike in any
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return build_model(config, vocab_size=vocab_size, seed=1)


def chunks_of(place: Any, tensor: torch.Tensor) -> list[ShardedTensor]:
    """The chunks that a parameter is stored as, with views of `tensor` as their data.

    Args:
        place: Megatron's description of the parameter's place in the global model.
        tensor: Its values, of any dtype and device.
    """
    if isinstance(place, ShardedTensorFactory):
        return list(nested_values(replace(place, data=tensor).build()))
    return [replace(place, data=tensor, dtype=tensor.dtype)]


def sizes_of(chunk: ShardedTensor) -> tuple[int, ...]:
    """Shape of a chunk, with as many axes as the global tensor."""
    return (*(1,) * chunk.prepend_axis_num, *chunk.local_shape)


class Scratch:
    """Memory for one parameter at a time; memory given back and asked for anew would grow."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._tensor = torch.empty(0)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor; the one before is overwritten."""
        count = math.prod(shape)
        if len(self._bytes) < count * dtype.itemsize:
            self._tensor, self._bytes = torch.empty(0), bytearray()  # before asking for more
            self._bytes = bytearray(count * dtype.itemsize)
        self._tensor = torch.frombuffer(self._bytes, dtype=dtype, count=count).view(*shape)
        return self._tensor

    def alone(self, view: torch.Tensor) -> torch.Tensor:
        """A contiguous view of the tensor, with a storage that ends where the view does."""
        offset, count = view.data_ptr() - self._tensor.data_ptr(), view.numel()
        assert view.is_contiguous() and 0 <= offset < self._tensor.nbytes, "not a view of it"
        found = torch.frombuffer(self._bytes, dtype=view.dtype, count=count, offset=offset)
        return found.view(view.shape)
