"""Lightning attention as operators of PyTorch: `torch.ops.m1.lightning_*`.

Each has a fake implementation and, where it has gradients, an autograd rule, so it is traced by
`torch.compile` as one node. Arguments are checked by the callers in `dispatch.py`.

Shapes: T tokens, N sequences, M segments, H heads, D key dims, E value dims.
"""

from typing import Any

import torch
import torch.nn.functional as F

from m1_kernels.lightning_attention.chunk import Plan, Walk, attend, gradients, plan, tile


def make_walk(
    k: torch.Tensor, width: int, slopes: torch.Tensor, cu_seqlens: torch.Tensor, invariant: bool
) -> Walk:
    """The forward walk over k [T, H, D] and values of so many dims."""
    return Walk(slopes, cu_seqlens, _plan(k, width, cu_seqlens, invariant))


def _plan(k: torch.Tensor, width: int, cu_seqlens: torch.Tensor, invariant: bool) -> Plan:
    num_tokens, num_heads, head_dim = k.shape
    slices = -(-width // tile(k.dtype, head_dim, width).columns)
    num_sequences = cu_seqlens.shape[0] - 1
    return plan(num_tokens, num_sequences, num_heads * slices, batch_invariant=invariant)


def readable(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors whose last dimension is dense, as the kernels read them."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


@torch.library.custom_op("m1::lightning_attention", mutates_args=())
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None,
    with_final_state: bool,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs [T, H, E], final states [N, H, D, E] or empty, and segments' states or empty."""
    q, k, v = readable(q, k, v)
    walk = make_walk(k, v.shape[-1], slopes, cu_seqlens, batch_invariant)
    out = q.new_empty(v.shape)
    final = slopes.new_empty(_final_shape(k, v, cu_seqlens)) if with_final_state else None
    entering = attend(q, k, v, walk, out=out, initial=initial_state, final=final)
    empty = slopes.new_empty(0)
    return out, empty if final is None else final, empty.clone() if entering is None else entering


def _final_shape(
    k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor
) -> tuple[int, int, int, int]:
    return cu_seqlens.shape[0] - 1, k.shape[1], k.shape[2], v.shape[2]


@attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None,
    with_final_state: bool,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = _final_shape(k, v, cu_seqlens)
    cut = _plan(k, v.shape[-1], cu_seqlens, batch_invariant)
    final = slopes.new_empty(shape if with_final_state else 0)
    entering = slopes.new_empty((cut.num_segments, *shape[1:]) if cut.is_cut else 0)
    return q.new_empty(v.shape), final, entering


@torch.library.custom_op("m1::lightning_attention_backward", mutates_args=())
def attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    entering: torch.Tensor | None,
    d_out: torch.Tensor,
    d_final: torch.Tensor | None,
    with_d_initial: bool,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and, or empty, of the initial state."""
    q, k, v, d_out = readable(q, k, v, d_out)
    walk = make_walk(k, v.shape[-1], slopes, cu_seqlens, batch_invariant)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    d_initial = slopes.new_empty(_final_shape(k, v, cu_seqlens)) if with_d_initial else None
    gradients(
        q, k, v, walk, entering=entering, d_out=d_out, d_final=d_final, into=(dq, dk, dv),
        d_initial=d_initial,
    )  # fmt: skip
    return dq, dk, dv, slopes.new_empty(0) if d_initial is None else d_initial


@attention_backward.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    entering: torch.Tensor | None,
    d_out: torch.Tensor,
    d_final: torch.Tensor | None,
    with_d_initial: bool,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    d_initial = slopes.new_empty(_final_shape(k, v, cu_seqlens) if with_d_initial else 0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_initial


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, slopes, cu_seqlens, initial, with_final, invariant = inputs
    entering = output[2]
    state = initial if entering.numel() == 0 else entering
    ctx.save_for_backward(q, k, v, slopes, cu_seqlens, state)
    ctx.with_initial, ctx.with_final, ctx.invariant = initial is not None, with_final, invariant
    ctx.mark_non_differentiable(entering)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, d_out: torch.Tensor | None, d_final: torch.Tensor | None, _: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    q, k, v, slopes, cu_seqlens, state = ctx.saved_tensors
    d_out = torch.zeros_like(v, dtype=q.dtype) if d_out is None else d_out
    d_final = d_final.contiguous() if ctx.with_final and d_final is not None else None
    dq, dk, dv, d_initial = attention_backward(
        q, k, v, slopes, cu_seqlens, state, d_out, d_final, ctx.with_initial, ctx.invariant
    )
    return dq, dk, dv, None, None, d_initial if ctx.with_initial else None, None, None


attention.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("m1::lightning_attention_qkv", mutates_args=())
def attention_qkv(
    qkv: torch.Tensor, slopes: torch.Tensor, cu_seqlens: torch.Tensor, batch_invariant: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs [T, H, D] of q, k, v = SiLU(qkv [T, H, 3, D]), SiLU(qkv), segments' states or empty.

    SiLU is a pass of its own: done by the walks as they load, it makes them four times slower.
    """
    activated = F.silu(qkv.contiguous())
    q, k, v = activated.unbind(2)
    walk = make_walk(k, v.shape[-1], slopes, cu_seqlens, batch_invariant)
    out = qkv.new_empty(v.shape)
    entering = attend(q, k, v, walk, out=out)
    return out, activated, slopes.new_empty(0) if entering is None else entering


@attention_qkv.register_fake
def _(
    qkv: torch.Tensor, slopes: torch.Tensor, cu_seqlens: torch.Tensor, batch_invariant: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, num_heads, _, head_dim = qkv.shape
    out = qkv.new_empty((num_tokens, num_heads, head_dim))
    cut = _plan(out, head_dim, cu_seqlens, batch_invariant)
    shape = (cut.num_segments, num_heads, head_dim, head_dim)
    entering = slopes.new_empty(shape if cut.is_cut else 0)
    return out, qkv.new_empty(qkv.shape), entering


@torch.library.custom_op("m1::lightning_attention_qkv_backward", mutates_args=())
def attention_qkv_backward(
    qkv: torch.Tensor,
    activated: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    entering: torch.Tensor | None,
    d_out: torch.Tensor,
    batch_invariant: bool,
) -> torch.Tensor:
    """Gradient [T, H, 3, D] of the fused projection."""
    qkv, (d_out,) = qkv.contiguous(), readable(d_out)
    q, k, v = activated.unbind(2)
    walk = make_walk(k, v.shape[-1], slopes, cu_seqlens, batch_invariant)
    d_qkv = qkv.new_empty(qkv.shape)
    gradients(
        q, k, v, walk, entering=entering, d_out=d_out, d_final=None, into=d_qkv.unbind(2)
    )  # fmt: skip
    torch.ops.aten.silu_backward.grad_input(d_qkv, qkv, grad_input=d_qkv)  # in place
    return d_qkv


@attention_qkv_backward.register_fake
def _(
    qkv: torch.Tensor,
    activated: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    entering: torch.Tensor | None,
    d_out: torch.Tensor,
    batch_invariant: bool,
) -> torch.Tensor:
    return qkv.new_empty(qkv.shape)


def _keep_qkv(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    qkv, slopes, cu_seqlens, invariant = inputs
    _, activated, entering = output
    state = entering if entering.numel() else None
    ctx.save_for_backward(qkv, activated, slopes, cu_seqlens, state)
    ctx.invariant = invariant
    ctx.mark_non_differentiable(activated, entering)
    ctx.set_materialize_grads(False)


def _backward_qkv(
    ctx: Any, d_out: torch.Tensor | None, *_: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if d_out is None:
        return None, None, None, None
    saved = ctx.saved_tensors
    d_qkv = attention_qkv_backward(*saved, d_out, ctx.invariant)
    return d_qkv, None, None, None


attention_qkv.register_autograd(_backward_qkv, setup_context=_keep_qkv)


@torch.library.custom_op("m1::lightning_attention_prefill", mutates_args=("states",))
def attention_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    initial_state: torch.Tensor | None,
    batch_invariant: bool,
) -> torch.Tensor:
    """Outputs [T, H, E]; the sequences' final states go into rows `slots` of a table."""
    q, k, v = readable(q, k, v)
    walk = make_walk(k, v.shape[-1], slopes, cu_seqlens, batch_invariant)
    out = q.new_empty(v.shape)
    attend(q, k, v, walk, out=out, initial=initial_state, final=states, slots=slots)
    return out


@attention_prefill.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    initial_state: torch.Tensor | None,
    batch_invariant: bool,
) -> torch.Tensor:
    return q.new_empty(v.shape)
