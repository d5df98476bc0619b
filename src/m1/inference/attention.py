"""Attention of one step over the cache, for rows of one token and for chunks of prompts.

Shapes: B rows that decode, T tokens of a chunk, H heads, KV key-value heads, D head dim, S slots,
P pages of G tokens, n pages of a row.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from m1_kernels.lightning_attention import lightning_attention, lightning_attention_step


def decode_lightning(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    decay: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor | slice,
) -> torch.Tensor:
    """One token for each of B rows whose states are rows of a table, updated in place.

    Args:
        q: [B, H, D].
        k: [B, H, D].
        v: [B, H, D].
        slopes: float32 [H].
        decay: float32 [H, 1, 1], exp(-slope).
        table: float32 [S, H, D, D].
        slots: int64 [B], distinct but for -1, which reads and writes the table's last row; or the
            range of the table that the rows are.

    Returns:
        [B, H, D] in q's dtype.
    """
    state = table[slots]
    if q.is_cuda:
        out = lightning_attention_step(q, k, v, slopes, state, batch_invariant=True)
    else:
        state.mul_(decay).addcmul_(k.float()[..., None], v.float()[:, :, None])
        out = (q.float()[..., None] * state).sum(2).to(q.dtype)  # faster than many small products
    if isinstance(slots, torch.Tensor):
        table[slots] = state
    return out


def prefill_lightning(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    carried: list[tuple[int, slice, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks of N sequences laid end to end, some of which continue from a state.

    The output is linear in the state, so what it adds is added afterwards:
    o_i += lam^(i+1) q_i S_0 and S += lam^T S_0, with lam = exp(-slope).

    Args:
        q: [T, H, D].
        k: [T, H, D].
        v: [T, H, D].
        slopes: float32 [H].
        cu_seqlens: int32 [N + 1].
        carried: Number, tokens and state float32 [H, D, D] of each sequence that continues.

    Returns:
        Outputs [T, H, D] in q's dtype and final states float32 [N, H, D, D].
    """
    out, final = lightning_attention(q, k, v, slopes, cu_seqlens, output_final_state=True)
    assert final is not None
    for number, rows, state in carried:
        count = rows.stop - rows.start
        age = torch.arange(1, count + 1, device=q.device, dtype=torch.float32)
        decayed = q[rows].float() * torch.exp(-slopes * age[:, None])[..., None]
        carry = torch.einsum("thd,hde->the", decayed, state)
        out[rows] = (out[rows].float() + carry).to(out.dtype)
        final[number] += torch.exp(-slopes * count)[:, None, None] * state
    return out, final


def decode_softmax(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """One query for each of B rows over all its keys.

    Args:
        q: [B, H, D].
        keys: [P, G, KV, D].
        values: [P, G, KV, D].
        pages: int64 [B, n], a row's pages in order; what follows its last token is not read.
        lengths: int64 [B], tokens of each row, this one included.

    Returns:
        [B, H, D].
    """
    if q.is_cuda:
        from m1_kernels.paged_attention import paged_attention_decode

        attended: torch.Tensor = paged_attention_decode(q, keys, values, pages, lengths)
        return attended
    k, v = keys[pages].flatten(1, 2), values[pages].flatten(1, 2)
    visible = torch.arange(k.shape[1], device=q.device)[None] < lengths[:, None]
    out = F.scaled_dot_product_attention(
        q.unsqueeze(2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible[:, None, None],
        enable_gqa=True,
    )
    return out.squeeze(2)


def prefill_softmax(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pages: torch.Tensor, start: int
) -> torch.Tensor:
    """A chunk of one sequence, whose keys are in its pages already, over all tokens up to it.

    Args:
        q: [T, H, D], tokens `start` to `start + T - 1` of the sequence.
        keys: [P, G, KV, D].
        values: [P, G, KV, D].
        pages: int64 [n].
        start: Tokens before the chunk.

    Returns:
        [T, H, D].
    """
    length = start + q.shape[0]
    k, v = (x[pages].flatten(0, 1)[:length].transpose(0, 1)[None] for x in (keys, values))
    q = q.transpose(0, 1)[None]
    if start == 0:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    elif q.is_cuda:  # the flash kernels know this mask without making it
        bias = causal_lower_right(q.shape[2], length)
        repeat = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        age = torch.arange(q.shape[2], device=q.device)[:, None] + start
        mask = torch.arange(length, device=q.device)[None] <= age
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)
