"""Ranks of the trainer that sample: each replica of the engine takes its share of the prompts."""

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
        """Data-parallel ranks sample apart.

        With expert ranks an engine's steps are taken by ranks that hold different experts, and all
        of them sample everything.
        """
        world = parallel.world_size
        if world == 1:
            return cls()
        is_first = (
            parallel_state.get_tensor_model_parallel_rank() == 0
            and parallel_state.get_context_parallel_rank() == 0
        )
        if parallel.expert > 1:
            return cls(is_first=dist.get_rank() == 0, world=world)
        rank = parallel_state.get_data_parallel_rank()
        return cls(rank, parallel.data, is_first, world)

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
