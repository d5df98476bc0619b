"""Attention of one step over the cache, for rows of one token and for chunks of prompts.

Shapes: B rows that decode, T tokens of a chunk, H heads, KV key-value heads, D head dim, S slots,
P pages of G tokens, n pages of a row.
"""

import torch
import torch.nn.functional as F

from m1.inference.steps import Prompts
from m1_kernels.lightning_attention import lightning_attention_prefill, lightning_attention_step


def decode_lightning(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor | slice,
    *,
    batch_invariant: bool,
) -> torch.Tensor:
    """One token for each of B rows whose states are rows of a table, updated in place.

    Args:
        q: [B, H, D].
        k: [B, H, D].
        v: [B, H, D].
        slopes: float32 [H].
        table: float32 [S, H, D, D].
        slots: int64 [B], distinct but for -1, whose rows give zeros and write nothing; or the
            range of the table that the rows are.
        batch_invariant: Whether a row's bits must not depend on B.

    Returns:
        [B, H, D] in q's dtype.
    """
    if isinstance(slots, slice):
        return lightning_attention_step(
            q, k, v, slopes, table[slots], batch_invariant=batch_invariant
        )
    return lightning_attention_step(q, k, v, slopes, table, slots, batch_invariant=batch_invariant)


def prefill_lightning(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    table: torch.Tensor,
    prompts: Prompts,
    *,
    batch_invariant: bool,
) -> torch.Tensor:
    """Chunks of N prompts laid end to end; their states in the table go on.

    Args:
        q: [T, H, D].
        k: [T, H, D].
        v: [T, H, D].
        slopes: float32 [H].
        table: float32 [S, H, D, D].
        prompts: Where the chunks lie, and their states.
        batch_invariant: Whether a prompt's bits must not depend on the others.

    Returns:
        [T, H, D] in q's dtype.
    """
    entering = None
    if prompts.is_new is not None:
        entering = table[prompts.slots].masked_fill_(prompts.is_new[:, None, None, None], 0.0)
    return lightning_attention_prefill(
        q, k, v, slopes, prompts.cu_seqlens, table, prompts.slots,
        initial_state=entering, batch_invariant=batch_invariant,
    )  # fmt: skip


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
        from torch.nn.attention.bias import causal_lower_right  # imports torch's compiler: a second

        bias = causal_lower_right(q.shape[2], length)
        repeat = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        age = torch.arange(q.shape[2], device=q.device)[:, None] + start
        mask = torch.arange(length, device=q.device)[None] <= age
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)
