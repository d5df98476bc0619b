"""Lightning attention over sequences that are split over context-parallel ranks (LASP+).

Every sequence is cut into 2R chunks of equal length for R ranks; rank r holds chunks r and
2R-1-r, one after the other, which balances causal softmax attention, and is the layout that
Transformer Engine's attention expects. Each rank attends inside its chunks, the states after all
chunks are gathered, and the state that enters a chunk is a prefix sum over those before it:

    S_c = sum_{b < c} lam^(C (c-1-b)) K_b,     o_i += lam^(i+1) q_i S_c,

K_b the state after chunk b alone and C its length. (MiniMax-01 report, LASP+.) Only states cross
ranks: 2 D E floats for each head, sequence and rank, whatever the length. On a GPU the entering
state is the kernels' initial state, and the adjoints go the other way in the same manner.

Shapes: T tokens on this rank, N sequences, R ranks, H heads, D key dims, E value dims.
"""

import torch
import torch.distributed as dist

from m1_kernels.lightning_attention import checks
from m1_kernels.lightning_attention.collectives import AllGather, gather
from m1_kernels.lightning_attention.dispatch import (
    cast_inputs,
    lightning_attention,
    triton_kernels,
)


def lightning_attention_context(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Causal lightning attention over packed sequences that `group` shares.

    Args:
        q: [T, H, D].
        k: [T, H, D].
        v: [T, H, E].
        slopes: float32 [H].
        cu_seqlens: int [2N + 1], bounds of this rank's chunks: of each sequence the early one,
            then the late one.
        group: The context-parallel ranks.

    Returns:
        Outputs [T, H, E] in q's dtype.

    Raises:
        ImportError: The tensors are on a GPU and Triton is not installed.
        ValueError: An argument has a shape, dtype or device that cannot work.
    """
    q, k, v = cast_inputs(q, k, v)
    checks.check_heads(q, k, v, slopes)
    checks.check_bounds(cu_seqlens, q.shape[0], q.device)
    if q.is_cuda:

        def exchange(states: torch.Tensor, backwards: bool) -> torch.Tensor:
            every = gather(states, group)
            return entering_states(
                every, slopes, cu_seqlens, rank=group.rank(), backwards=backwards
            )

        return triton_kernels().ContextFunction.apply(  # type: ignore[no-any-return]
            q, k, v, slopes, cu_seqlens, exchange
        )
    out, final = lightning_attention(q, k, v, slopes, cu_seqlens, output_final_state=True)
    every = AllGather.apply(final, group)  # type: ignore[no-untyped-call]
    entering = entering_states(every, slopes, cu_seqlens, rank=group.rank())
    return _add_carried(out, q, entering, slopes, cu_seqlens)


def _add_carried(
    out: torch.Tensor,
    q: torch.Tensor,
    entering: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """Outputs with what the entering states [2N, H, D, E] add to them."""
    lengths = cu_seqlens.diff()
    starts = torch.repeat_interleave(cu_seqlens[:-1], lengths)
    position = torch.arange(q.shape[0], device=q.device) - starts
    weight = torch.exp(-slopes[None] * (position[:, None] + 1))  # [T, H]
    parts = torch.split(q.float() * weight[..., None], lengths.tolist())
    pairs = zip(parts, entering, strict=True)
    carried = torch.cat([torch.einsum("thd,hde->the", rows, state) for rows, state in pairs])
    return (out.float() + carried).to(q.dtype)


def entering_states(
    every: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    rank: int,
    backwards: bool = False,
) -> torch.Tensor:
    """States that enter a rank's chunks, or backwards the adjoints that enter at their ends.

    Args:
        every: float32 [R, 2N, H, D, E], of every rank's chunks alone.
        slopes: float32 [H].
        cu_seqlens: int [2N + 1].
        rank: r.
        backwards: The chunks follow each other from the last to the first.

    Returns:
        float32 [2N, H, D, E].
    """
    num_chunks = 2 * every.shape[0]
    early, late = every[:, 0::2], every[:, 1::2].flip(0)  # [R, N, H, D, E] each
    chunks = list(torch.cat((early, late)))  # in the order of the sequence: 2R of [N, H, D, E]
    length = cu_seqlens.diff()[0::2].float()  # [N]
    decay = torch.exp(-slopes[None] * length[:, None])[..., None, None]  # [N, H, 1, 1]
    order = range(num_chunks)
    state = torch.zeros_like(chunks[0])
    entering: dict[int, torch.Tensor] = {}
    for number in reversed(order) if backwards else order:
        entering[number] = state
        state = decay * state + chunks[number]
    mine = torch.stack((entering[rank], entering[num_chunks - 1 - rank]), dim=1)
    return mine.flatten(0, 1)
