"""Softmax attention (GQA, partial rotary) over packed sequences.

Shapes: T packed tokens, H heads and KV key-value heads of this rank, D head dim, N sequences.
Hidden states are [T, 1, hidden].
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp

from m1.model.packing import SequencePacking, context_indices
from m1_kernels.lightning_attention import AllGather


class SoftmaxAttention(SelfAttention):  # type: ignore[misc]
    """Megatron's GQA self-attention over packed sequences.

    RoPE turns the first `rotary_dim` dimensions of each head; the scale is 1/sqrt(D). The core is
    plain torch where the spec names none, and Transformer Engine's on GPUs. Over context-parallel
    ranks the plain core gathers all keys and values.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        rotary_pos_emb: torch.Tensor,
        packed_seq_params: SequencePacking,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states: [T, 1, hidden] ([T / tensor ranks, 1, hidden] under sequence
                parallelism).
            attention_mask: Unused; causality and bounds follow from `packed_seq_params`.
            rotary_pos_emb: Angles [max_length, 1, 1, rotary_dim] in radians.
            packed_seq_params: The packing.

        Returns:
            Output shaped as the input, and no bias.
        """
        q, k, v = (x.squeeze(1) for x in self.get_query_key_value_tensors(hidden_states))
        if isinstance(rotary_pos_emb, tuple):
            rotary_pos_emb = rotary_pos_emb[0]
        angles = rotary_pos_emb[packed_seq_params.positions].squeeze(1)
        cos, sin = angles.cos(), angles.sin()
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if not isinstance(self.core_attention, IdentityOp):
            out = self.core_attention(
                q,
                k,
                v.contiguous(),
                None,
                attn_mask_type=self.attn_mask_type,
                packed_seq_params=packed_seq_params,
            )
        elif packed_seq_params.chunks is not None:
            out = self._attend_gathered(q, k, v, packed_seq_params)
        else:
            out = self._attend(q, k, v, packed_seq_params.positions, packed_seq_params)
        return self.linear_proj(out.flatten(1).unsqueeze(1))  # type: ignore[no-any-return]

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        packing: SequencePacking,
    ) -> torch.Tensor:
        cu_seqlens, longest = packing.cu_seqlens_q.long(), packing.max_seqlen_q
        num_sequences = cu_seqlens.numel() - 1
        slot = torch.repeat_interleave(
            torch.arange(num_sequences, device=q.device) * longest, cu_seqlens.diff()
        )
        slot = slot + positions
        q, k, v = (_scatter(x, slot, num_sequences, longest) for x in (q, k, v))  # [N, len, *, D]
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1)[slot]

    def _attend_gathered(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: SequencePacking
    ) -> torch.Tensor:
        """Attention of this rank's queries to the keys and values of all context ranks."""
        group = self.pg_collection.cp
        lengths = packing.cu_seqlens_q.long().diff().cpu()
        places = torch.cat(
            [context_indices(lengths, rank=r, size=group.size()) for r in range(group.size())]
        ).to(q.device)
        mine = places.view(group.size(), -1)[group.rank()]
        order = places.argsort()
        k, v = (
            AllGather.apply(x, group).flatten(0, 1)[order]  # type: ignore[no-untyped-call]
            for x in (k, v)
        )
        starts = torch.repeat_interleave(packing.cu_seqlens_q[:-1].long(), lengths.to(q.device))
        positions = torch.arange(places.numel(), device=q.device) - starts
        q = q.new_zeros(places.numel(), *q.shape[1:]).index_copy(0, mine, q)
        return self._attend(q, k, v, positions, packing)[mine]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on the first dimensions of each head, halves paired (x_i, x_{i + rotary_dim/2}).

    Args:
        x: [T, heads, D].
        cos: [T, 1, rotary_dim], rotary_dim <= D.
        sin: Like `cos`.
    """
    rotary_dim = cos.shape[-1]
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = (turned * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def _scatter(x: torch.Tensor, slot: torch.Tensor, num_rows: int, length: int) -> torch.Tensor:
    padded = x.new_zeros(num_rows * length, *x.shape[1:])
    return padded.index_copy(0, slot, x).view(num_rows, length, *x.shape[1:])
