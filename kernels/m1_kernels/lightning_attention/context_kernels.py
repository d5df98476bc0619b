"""Lightning attention over context-parallel ranks by the kernels: two passes each way.

Forward, the states after the chunks alone, then the outputs from the states that enter them.
Backward, the adjoints before the chunks alone, then the gradients from the adjoints that enter
them at their ends. Between the passes only states cross ranks, and nothing waits for the device.

Shapes: T tokens on this rank, N chunks, H heads, D key dims, E value dims.
"""

from collections.abc import Callable
from typing import Any

import torch

from m1_kernels.lightning_attention.chunk import Walk, attend, gradients, local_states
from m1_kernels.lightning_attention.ops import make_walk, readable

Exchange = Callable[[torch.Tensor, bool], torch.Tensor]
"""States [N, H, D, E] after this rank's chunks -> those that enter them; backwards if True."""


class ContextFunction(torch.autograd.Function):
    """Outputs [T, H, E] of this rank's chunks; gradients of q, k and v."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        slopes: torch.Tensor,
        cu_seqlens: torch.Tensor,
        exchange: Exchange,
    ) -> torch.Tensor:
        q, k, v = readable(q, k, v)
        walk = make_walk(k, v.shape[-1], slopes, cu_seqlens, False)
        final, local = local_states(walk, k, v)
        initial = exchange(final, False).contiguous()
        out = q.new_empty(v.shape)
        entering = attend(q, k, v, walk, out=out, initial=initial, local=local)
        state = initial if entering is None else entering
        ctx.save_for_backward(q, k, v, slopes, cu_seqlens, state)
        ctx.exchange = exchange
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        q, k, v, slopes, cu_seqlens, entering = ctx.saved_tensors
        (d_out,) = readable(grads[0])
        walk = make_walk(k, v.shape[-1], slopes, cu_seqlens, False)
        reverse = Walk(slopes, cu_seqlens, walk.plan, backwards=True)
        adjoint, local = local_states(reverse, q, d_out)
        d_final = ctx.exchange(adjoint, True).contiguous()
        into = tuple(x.new_empty(x.shape) for x in (q, k, v))
        gradients(
            q, k, v, walk, entering=entering, d_out=d_out, d_final=d_final, into=into, local=local
        )
        return *into, None, None, None
