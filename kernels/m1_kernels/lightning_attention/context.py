"""Lightning attention over sequences that are split over context-parallel ranks (LASP+).

Every sequence is cut into 2R chunks of equal length for R ranks; rank r holds chunks r and
2R-1-r, one after the other, which balances causal softmax attention, and is the layout that
Transformer Engine's attention expects. Each rank attends inside its chunks, the states after all
chunks are gathered, and the state that enters a chunk is a prefix sum over those before it:

    S_c = sum_{b < c} lam^(C (c-1-b)) K_b,     o_i += lam^(i+1) q_i S_c,

K_b the state after chunk b alone and C its length. (MiniMax-01 report, LASP+.) Only states cross
ranks: 2 D E floats for each head, sequence and rank, whatever the length.

Shapes: T tokens on this rank, N sequences, R ranks, H heads, D key dims, E value dims.
"""

import torch
import torch.distributed as dist

from m1_kernels.lightning_attention.collectives import AllGather
from m1_kernels.lightning_attention.dispatch import lightning_attention


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
    """
    out, final = lightning_attention(q, k, v, slopes, cu_seqlens, output_final_state=True)
    assert final is not None
    entering = _entering_states(final, slopes, cu_seqlens, group)
    lengths = cu_seqlens.diff()
    starts = torch.repeat_interleave(cu_seqlens[:-1], lengths)
    position = torch.arange(q.shape[0], device=q.device) - starts
    weight = torch.exp(-slopes[None] * (position[:, None] + 1))  # [T, H]
    split = lengths.tolist()
    parts = torch.split(q.float() * weight[..., None], split)
    pairs = zip(parts, entering, strict=True)
    carried = torch.cat([torch.einsum("thd,hde->the", rows, state) for rows, state in pairs])
    return (out.float() + carried).to(q.dtype)


def _entering_states(
    final: torch.Tensor, slopes: torch.Tensor, cu_seqlens: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """States [2N, H, D, E] that enter this rank's chunks."""
    size, rank = group.size(), group.rank()
    gathered = AllGather.apply(final, group)  # type: ignore[no-untyped-call]
    early, late = gathered[:, 0::2], gathered[:, 1::2].flip(0)  # [R, N, H, D, E] each
    chunks = torch.cat((early, late))  # in the order of the sequence: [2R, N, H, D, E]
    length = cu_seqlens.diff()[0::2].float()  # [N]
    decay = torch.exp(-slopes[None] * length[:, None])[..., None, None]  # [N, H, 1, 1]
    state, entering = torch.zeros_like(chunks[0]), []
    for chunk in chunks:
        entering.append(state)
        state = decay * state + chunk
    mine = torch.stack((entering[rank], entering[2 * size - 1 - rank]), dim=1)
    return mine.flatten(0, 1)
