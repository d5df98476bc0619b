"""Collectives with gradients, for what ranks share."""

from typing import Any

import torch
import torch.distributed as dist


class AllGather(torch.autograd.Function):
    """Stack a tensor of every rank of a group: [...] -> [R, ...]; its gradient is summed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:  # noqa: D102
        ctx.group = group
        return gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: D102
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()], None


class SumOverRanks(torch.autograd.Function):
    """Add a tensor over a group; its gradient is added too, as every rank's result uses the sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:  # noqa: D102
        ctx.group = group
        return add_over_ranks(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: D102
        return add_over_ranks(grads[0], ctx.group), None


def gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Stack x of every rank: [...] -> [R, ...]; without gradients."""
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)


def add_over_ranks(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of the ranks' x, which is left as it is; without gradients."""
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x
