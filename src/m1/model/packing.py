"""How token sequences reach the model: packed end to end.

Shapes: T tokens of all sequences, N sequences, R context-parallel ranks.
"""

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class SequencePacking(PackedSeqParams):  # type: ignore[misc]
    """megatron's packed-sequence parameters with what our layers read besides.

    Under context parallelism `cu_seqlens_q` bounds the whole sequences, as Transformer Engine wants
    it, while `positions` and `chunks` are about the tokens of this rank.
    """

    positions: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 [T], position of each token in its sequence."""
    chunks: torch.Tensor | None = None
    """int32 [2N + 1], bounds of this rank's two chunks of every sequence; None on one rank."""
    routed_experts: torch.Tensor | None = None
    """int16 [T, layers, k], experts to use instead of the router's own choice; see
    `m1.model.routing`."""


def pack(
    lengths: torch.Tensor,
    *,
    context_rank: int = 0,
    context_size: int = 1,
    device: torch.device | None = None,
) -> SequencePacking:
    """Describe sequences of the given lengths laid end to end.

    Args:
        lengths: int64 [N] on the CPU, each at least 1; over several context-parallel ranks each a
            multiple of 2R.
        context_rank: This rank among those that share every sequence.
        context_size: R.
        device: Where the result lies; absent: the CPU.
    """
    cu_seqlens = _bounds(lengths)
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths)
    positions = torch.arange(int(cu_seqlens[-1])) - starts
    chunks = None
    if context_size > 1:
        positions = positions[context_indices(lengths, rank=context_rank, size=context_size)]
        chunks = _bounds((lengths // (2 * context_size)).repeat_interleave(2)).to(device)
    longest = int(lengths.max())
    cu_seqlens = cu_seqlens.to(device)
    return SequencePacking(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        positions=positions.to(device),
        chunks=chunks,
    )


def context_indices(lengths: torch.Tensor, *, rank: int, size: int) -> torch.Tensor:
    """Which of the packed tokens a context-parallel rank holds, in its order.

    Every sequence is cut into 2R equal chunks, of which rank r holds numbers r and 2R-1-r.

    Args:
        lengths: int64 [N], multiples of 2R.
        rank: r.
        size: R.

    Returns:
        int64 [T / R], ascending.
    """
    chunk = lengths // (2 * size)
    starts = lengths.cumsum(0) - lengths
    first = torch.stack((starts + rank * chunk, starts + (2 * size - 1 - rank) * chunk), dim=1)
    count = chunk.repeat_interleave(2)
    offset = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)
    return first.flatten().repeat_interleave(count) + offset


def _bounds(lengths: torch.Tensor) -> torch.Tensor:
    bounds = torch.zeros(lengths.numel() + 1, dtype=torch.int32)
    bounds[1:] = lengths.cumsum(0)
    return bounds
