"""Ranks of the trainer that sample: each replica of the engine takes its share of the prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import parallel_state

from m1.config.schema import ParallelConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Replicas:
    """This rank's place among the engines that sample for the trainer."""

    index: int = 0
    num: int = 1
    is_first: bool = True
    """Whether this rank speaks for its replica."""
    world: int = 1

    @classmethod
    def of(cls, parallel: ParallelConfig) -> "Replicas":
        """This rank's place in a layout; `m1.model.parallel.initialize` came before."""
        if parallel.world_size == 1:
            return cls()
        size, rank, world = ranks_of_an_engine(), dist.get_rank(), dist.get_world_size()
        return cls(rank // size, world // size, rank % size == 0, world)

    @classmethod
    def on_first_rank(cls) -> "Replicas":
        """Only the first rank samples, by engines elsewhere."""
        return cls(is_first=dist.get_rank() == 0, world=dist.get_world_size())

    def share(self, items: Sequence[T]) -> list[T]:
        """This replica's part."""
        return list(items[self.index :: self.num])

    def gather(self, mine: Sequence[T]) -> list[T]:
        """All replicas' parts in the order before `share`, the same on every rank."""
        if self.world == 1:
            return list(mine)
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, (self.index, list(mine)) if self.is_first else None)
        parts = dict(part for part in found if part is not None)
        total = sum(map(len, parts.values()))
        return [parts[i % self.num][i // self.num] for i in range(total)]


def ranks_of_an_engine() -> int:
    """How many consecutive ranks take an engine's steps together.

    Ranks of one tensor or expert group compute a step together, so they take the same share; every
    other division of the ranks (data, context) holds a copy of the model.
    """
    groups = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_expert_tensor_and_model_parallel_group(),
    )
    size = math.lcm(*(group.size() for group in groups))
    for group in groups:
        members = {rank // size for rank in dist.get_process_group_ranks(group)}
        assert len(members) == 1, f"ranks {members} compute together but are not consecutive"
    return size
