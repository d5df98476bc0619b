"""Ranks that hold whole copies of the model share the sampling, and all get every result.

Ranks of one tensor or expert group compute a step together, so they take the same share; every
other division of the ranks (data, context) holds a copy of its own.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import parallel_state

Given = TypeVar("Given")
Made = TypeVar("Made")


def shared(items: Sequence[Given], make: Callable[[Sequence[Given]], Sequence[Made]]) -> list[Made]:
    """`make(items)`, each copy of the model making its share.

    What comes back is the same object by object on all ranks: even where `make` depends on luck,
    as a verifier that is short of time does, ranks cannot fall out of step.

    Args:
        items: The same on every rank.
        make: One result for each item, in order; it must not depend on which items it is given
            together.

    Returns:
        Results of all items, in order.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return list(make(items))
    size = ranks_of_a_copy()
    copy, copies = dist.get_rank() // size, world // size
    made = list(make(items[copy::copies]))
    gathered: list[Any] = [None] * world
    # One rank speaks for its copy; where results depend on luck the others' may differ.
    dist.all_gather_object(gathered, made if dist.get_rank() % size == 0 else None)
    shares = gathered[::size]
    return [shares[number % copies][number // copies] for number in range(len(items))]


def ranks_of_a_copy() -> int:
    """How many consecutive ranks sample together."""
    groups = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_expert_tensor_and_model_parallel_group(),
    )
    size = math.lcm(*(group.size() for group in groups))
    for group in groups:
        members = {rank // size for rank in dist.get_process_group_ranks(group)}
        assert len(members) == 1, f"ranks {members} compute together but are not consecutive"
    return size
