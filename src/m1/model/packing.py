"""How token sequences reach the model: packed end to end, in training and in decoding alike.

Shapes: T tokens of all sequences, N sequences, H heads, D head dim, S slots.
"""

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class LayerState:
    """What one layer remembers of every slot."""

    recurrent: torch.Tensor | None = None
    """Lightning layers: float32 [S, H, D, D]."""
    keys: torch.Tensor | None = None
    """Softmax layers: [S, max_length, KV, D]."""
    values: torch.Tensor | None = None
    """Softmax layers: [S, max_length, KV, D]."""


@dataclass
class SequencePacking(PackedSeqParams):  # type: ignore[misc]
    """megatron's packed-sequence parameters with what our layers read besides.

    Without `states`: training or scoring. With `states` and `is_decode` false: prefill, which also
    writes the state of
    sequence n to row n. With `is_decode`: every sequence has one token, and row n of the states
    belongs to sequence n.
    """

    positions: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 [T], position of each token in its sequence."""
    is_decode: bool = False
    states: dict[int, LayerState] | None = None
    """Layer number (from 1) -> state; absent without a cache."""


def pack(lengths: torch.Tensor, *, states: dict[int, LayerState] | None = None) -> SequencePacking:
    """Describe sequences of the given lengths laid end to end.

    Args:
        lengths: int64 [N], each at least 1.
        states: Filled with the states after each sequence when given.
    """
    cu_seqlens = torch.zeros(lengths.numel() + 1, dtype=torch.int32, device=lengths.device)
    cu_seqlens[1:] = lengths.cumsum(0)
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths)
    positions = torch.arange(int(cu_seqlens[-1]), device=lengths.device) - starts
    longest = int(lengths.max())
    return SequencePacking(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        positions=positions,
        states=states,
    )


def decode_step(
    positions: torch.Tensor, states: dict[int, LayerState], *, max_length: int
) -> SequencePacking:
    """Describe one decoding step.

    Args:
        positions: int64 [N], position of the new token of each slot.
        states: States of the N slots, updated in place.
        max_length: Upper bound on positions + 1, constant over steps so that the RoPE table is
            built once.
    """
    cu_seqlens = torch.arange(positions.numel() + 1, dtype=torch.int32, device=positions.device)
    return SequencePacking(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_length,
        max_seqlen_kv=max_length,
        positions=positions,
        is_decode=True,
        states=states,
    )
