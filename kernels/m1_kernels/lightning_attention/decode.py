"""Decoding over a table of states, in place: one or a few tokens for every row of a batch.

    S <- lam S + k_t^T v_t,   o_t = q_t S

The table is read and written once per call, whatever the number of tokens, in float32. Nothing is
read on the host and the grid depends on shapes only, so a call can be captured in a CUDA graph;
rows of a padded batch are switched off by a negative slot.

Shapes: B rows, S tokens per row, H heads, D key dims, E value dims.
"""

import torch
import triton
import triton.language as tl

from m1_kernels.lightning_attention.walk import decay_parts

_MANY_ROWS = 32
"""Rows from which wide tiles move the most bytes a second; below, narrow ones start sooner."""
_NARROW, _WIDE = (32, 2), (128, 4)
"""Columns of values and warps of one program."""
_MOST_NUMBERS = 1 << 14
"""Numbers of a state that the registers of four warps hold."""


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _step_kernel(
    q, k, v, out, slopes, states, slots, num_heads, num_tokens,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    D: tl.constexpr, D_POWER: tl.constexpr, E: tl.constexpr,
    BE: tl.constexpr, HAS_SLOTS: tl.constexpr, IS_SILU: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    slot = row
    if HAS_SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
    d = tl.arange(0, D_POWER)
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    is_d, is_e = d < D, e < E
    q_at, k_at = row * stride_qb + head * stride_qh + d, row * stride_kb + head * stride_kh + d
    v_at, o_at = row * stride_vb + head * stride_vh + e, row * num_tokens * (num_heads * E) + e
    is_used = slot >= 0
    at = (slot * num_heads + head) * (D * E) + d[:, None] * E + e[None, :]
    is_inside = is_d[:, None] & is_e[None, :] & is_used
    s = tl.load(states + at, mask=is_inside, other=0.0)
    keep, lost = decay_parts(-tl.load(slopes + head))
    for token in range(0, num_tokens):
        q_t = tl.load(q + q_at + token * stride_qs, mask=is_d & is_used, other=0.0).to(tl.float32)
        k_t = tl.load(k + k_at + token * stride_ks, mask=is_d & is_used, other=0.0).to(tl.float32)
        v_t = tl.load(v + v_at + token * stride_vs, mask=is_e & is_used, other=0.0).to(tl.float32)
        if IS_SILU:
            kind = out.dtype.element_ty
            q_t = _silu(q_t).to(kind).to(tl.float32)
            k_t = _silu(k_t).to(kind).to(tl.float32)
            v_t = _silu(v_t).to(kind).to(tl.float32)
        s = keep * s + (lost * s + k_t[:, None] * v_t[None, :])
        o_t = tl.sum(q_t[:, None] * s, axis=0)
        tl.store(
            out + o_at + (token * num_heads + head) * E, o_t.to(out.dtype.element_ty), mask=is_e
        )
    tl.store(states + at, s, mask=is_inside)


@torch.library.custom_op("m1::lightning_attention_step", mutates_args=("states",))
def attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor | None,
    silu: bool,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Outputs [B, S, H, E] of q, k [B, S, H, D] and v [B, S, H, E]; updates `states` in place.

    Args:
        q: [B, S, H, D], the last dimension dense, as in k and v.
        k: [B, S, H, D].
        v: [B, S, H, E].
        slopes: float32 [H].
        states: float32 [slots, H, D, E], contiguous.
        slots: int [B], each row's place in the table, no two alike; negative rows are left out
            and give zeros. None: row b has slot b.
        silu: q, k and v pass through SiLU first.
        batch_invariant: Choose the tile, so the order of sums, without regard to B.
    """
    num_rows, num_tokens, num_heads, head_dim = q.shape
    width = v.shape[-1]
    out = q.new_empty(v.shape)
    columns, warps = _WIDE if num_rows >= _MANY_ROWS and not batch_invariant else _NARROW
    depth = triton.next_power_of_2(head_dim)
    columns = min(columns, triton.next_power_of_2(width), _MOST_NUMBERS // depth)
    _step_kernel[(triton.cdiv(width, columns), num_heads, num_rows)](
        q, k, v, out, slopes, states, slopes if slots is None else slots, num_heads,
        num_tokens,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        D=head_dim, D_POWER=depth, E=width,
        BE=columns, HAS_SLOTS=slots is not None, IS_SILU=silu, num_warps=warps,
    )  # fmt: skip
    return out


@attention_step.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor | None,
    silu: bool,
    batch_invariant: bool = False,
) -> torch.Tensor:
    return q.new_empty(v.shape)
