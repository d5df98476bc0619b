"""Routing replay: experts chosen elsewhere instead of the router's own top-k.

The engine and the trainer compute in other orders and precisions, so that a token whose k-th and
next expert are close may meet different experts in each, and its probability jumps. Rollout routing
replay (R3, Ma et al. 2025, arXiv:2510.11370) makes the trainer use the engine's choice. The weights
are still w = softmax over the trainer's own logits of these experts, so the router learns; only
which experts they are is given.

Shapes: T tokens, E experts, k chosen.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

TopK = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class RoutingReplay:
    """What megatron's TopKRouter asks instead of its top-k, in place of its own `RouterReplay`.

    That one keeps a list of all routers of the process and a queue for recomputation, and has no
    notion of a token without a record; here a layer sets its target before each call, also when it
    is called again in the backward pass.
    """

    def __init__(self) -> None:
        self.target: torch.Tensor | None = None
        """Integer [T, k]; a row of -1 has no record and gets the router's own choice."""
        self.counts: torch.Tensor | None = None
        """float64 [2]: recorded tokens whose experts differ from the router's own, and all."""

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: TopK | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [T, k] and numbers int64 [T, k] of the experts to use.

        Args:
            scores: [T, E], the trainer's own.
            topk: k.
            num_groups: For `default_compute_topk`.
            group_topk: For `default_compute_topk`.
            default_compute_topk: The router's own choice.
        """
        assert default_compute_topk is not None
        own, chosen = default_compute_topk(
            scores, topk, num_groups=num_groups, group_topk=group_topk
        )
        if self.target is None:
            return own, chosen
        target = self.target.long()
        is_recorded = target[:, :1] >= 0
        if not torch.is_grad_enabled():
            self._count(target, chosen, is_recorded)
        chosen = torch.where(is_recorded, target, chosen)
        return scores.gather(1, chosen), chosen

    def _count(self, target: torch.Tensor, own: torch.Tensor, is_recorded: torch.Tensor) -> None:
        is_same = (target[:, :, None] == own[:, None, :]).any(-1).all(-1)
        differing = (is_recorded[:, 0] & ~is_same).sum()
        found = torch.stack((differing, is_recorded.sum())).double()
        self.counts = found if self.counts is None else self.counts + found


def make_replayable(model: torch.nn.Module) -> None:
    """Let the routers of a model be told which experts to use."""
    for router in _routers(model):
        router.router_replay = RoutingReplay()


@contextlib.contextmanager
def replaying(router: Any, target: torch.Tensor) -> Iterator[None]:
    """Have a router use experts [T, k] of any integer type within the block."""
    replay: RoutingReplay = router.router_replay
    replay.target = target
    try:
        yield
    finally:
        replay.target = None


def take_difference(model: torch.nn.Module) -> float | None:
    """Share of tokens, over layers, whose own experts were others than the replayed ones.

    Counts what was computed without gradients since the last call, on all ranks, which must call it
    together; None where nothing was replayed.
    """
    replays = [router.router_replay for router in _routers(model)]
    found = [replay.counts for replay in replays if replay.counts is not None]
    for replay in replays:
        replay.counts = None
    if not found:
        return None
    total = torch.stack(found).sum(0)
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    differing, count = (float(x) for x in total)
    return differing / max(count, 1.0)


def _routers(model: torch.nn.Module) -> list[Any]:
    return [part for part in model.modules() if hasattr(part, "router_replay")]
