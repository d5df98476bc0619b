"""Lightning attention on a GPU in Triton: forward, backward, packed sequences, states in and out.

One program walks a segment of one sequence for one head and a slice of the values, chunk by chunk,
with the state on chip. With lam = exp(-slope), i a token's place in its chunk and c the chunk's
middle, the decay lam^(i-j) is put about the middle as r_i c_j, r_i = lam^(i-c), c_j = lam^(c-j):

    o_i = r_i (q_i A + sum_{j <= i} (q_i k_j) c_j v_j),     A <- lam^C (A + sum_j k_j^T c_j v_j),

A = lam^(c+1) S, so no decay matrix is made. The gradients are walks too: with G_t = q_t^T do_t +
lam G_{t+1} the adjoint of the state,

    dq_t = do_t S_t^T (forwards over do, v, k),  dk_t = v_t G_t^T and dv_t = k_t G_t (backwards).

Where sequences times heads are few, sequences are cut into segments: local states, a scan over the
segments of a sequence, then the walk. Sums run in float32; results do not depend on the run.

Shapes: T tokens, N sequences, M segments, H heads, D key dims, E value dims.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

CHUNK = 64
SEGMENT_TOKENS = 2048
ENOUGH_PROGRAMS = 256
"""Programs that keep a large GPU busy; below, sequences are cut into segments."""
_SLICE = 64
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _walk_kernel(
    q, k, v, out, slopes, bounds, state_in, state_out,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    NUM_HEADS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BE: tl.constexpr,
    BACKWARDS: tl.constexpr, HAS_STATE: tl.constexpr, IS_TRANSPOSED: tl.constexpr,
    KEEP_STATE: tl.constexpr, WITH_OUTPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk one segment; `WITH_OUTPUT` false only carries the state to its end.

    The state enters a forward walk as S before the first token, so the first token sees lam S. It
    enters a backward walk as the adjoint of the state after the last token, which sees it
    undecayed, and leaves as that of the state before the first, lam G.
    """
    slice_e = tl.program_id(0)
    segment = tl.program_id(1) // NUM_HEADS
    head = tl.program_id(1) % NUM_HEADS
    first = tl.load(bounds + 2 * segment).to(tl.int64)
    length = (tl.load(bounds + 2 * segment + 1) - first).to(tl.int32)
    log_decay = -tl.load(slopes + head) * _LOG2_E
    middle: tl.constexpr = C // 2
    i = tl.arange(0, C)
    place = i.to(tl.float32)
    num_chunks = tl.cdiv(length, C)
    in_last = length - (num_chunks - 1) * C
    if BACKWARDS:
        row_scale = tl.exp2(log_decay * (middle - place))
        col_scale = tl.exp2(log_decay * (place - middle))
        entering = tl.exp2(log_decay * (in_last - 1 - middle).to(tl.float32))
        leaving = tl.exp2(-log_decay * (C - middle - 1))
        visible = i[None, :] >= i[:, None]
    else:
        row_scale = tl.exp2(log_decay * (place - middle))
        col_scale = tl.exp2(log_decay * (middle - place))
        entering = tl.exp2(log_decay * (middle + 1))
        leaving = tl.exp2(-log_decay * (middle + 1))
        visible = i[:, None] >= i[None, :]
    d = tl.arange(0, D)
    e = slice_e * BE + tl.arange(0, BE)
    k_at = k + first * stride_kt + head * stride_kh + i[:, None] * stride_kt + d[None, :]
    v_at = v + first * stride_vt + head * stride_vh + i[:, None] * stride_vt + e[None, :]
    if WITH_OUTPUT:
        q_at = q + first * stride_qt + head * stride_qh + i[:, None] * stride_qt + d[None, :]
        o_at = out + first * stride_ot + head * stride_oh + i[:, None] * stride_ot + e[None, :]
    state = (segment * NUM_HEADS + head).to(tl.int64) * (D * E)
    if IS_TRANSPOSED:
        state_at = state + e[None, :] * D + d[:, None]
    else:
        state_at = state + d[:, None] * E + e[None, :]
    a = tl.zeros([D, BE], dtype=tl.float32)
    if HAS_STATE:
        a = tl.load(state_in + state_at) * entering
    for step in tl.range(0, num_chunks):
        if BACKWARDS:
            chunk = num_chunks - 1 - step
        else:
            chunk = step
        is_inside = (chunk * C + i < length)[:, None]
        at = (chunk * C).to(tl.int64)
        k_c = tl.load(k_at + at * stride_kt, mask=is_inside, other=0.0)
        v_c = tl.load(v_at + at * stride_vt, mask=is_inside, other=0.0)
        v_c = (v_c * col_scale[:, None]).to(k_c.dtype)
        if WITH_OUTPUT:
            q_c = tl.load(q_at + at * stride_qt, mask=is_inside, other=0.0)
            scores = tl.dot(q_c, tl.trans(k_c), input_precision=PRECISION)
            o_c = tl.dot(q_c, a.to(q_c.dtype), input_precision=PRECISION)
            scores = tl.where(visible, scores, 0.0).to(q_c.dtype)
            o_c = tl.dot(scores, v_c, o_c, input_precision=PRECISION) * row_scale[:, None]
            tl.store(o_at + at * stride_ot, o_c.to(out.dtype.element_ty), mask=is_inside)
        a = tl.dot(tl.trans(k_c), v_c, a, input_precision=PRECISION)
        if BACKWARDS:
            a = a * tl.exp2(log_decay * C)
        else:
            a = a * tl.exp2(log_decay * tl.minimum(C, length - chunk * C).to(tl.float32))
    if KEEP_STATE:
        tl.store(state_out + state_at, a * leaving)


@triton.jit
def _scan_kernel(
    local, entering, last, given, slopes, bounds, segment_range,
    NUM_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, BACKWARDS: tl.constexpr,
    HAS_GIVEN: tl.constexpr,
):  # fmt: skip
    """States that enter the segments of a sequence, and the one that leaves the last of them.

    Backwards, states are adjoints just before their segment's first token, lam G of it.
    """
    sequence = tl.program_id(1) // NUM_HEADS
    head = tl.program_id(1) % NUM_HEADS
    log_decay = -tl.load(slopes + head) * _LOG2_E
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(segment_range + sequence)
    end = tl.load(segment_range + sequence + 1)
    whole = (sequence * NUM_HEADS + head).to(tl.int64) * SIZE
    state = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_GIVEN:
        state = tl.load(given + whole + at)
    for step in range(0, end - begin):
        if BACKWARDS:
            segment = end - 1 - step
        else:
            segment = begin + step
        offset = (segment * NUM_HEADS + head).to(tl.int64) * SIZE
        count = tl.load(bounds + 2 * segment + 1) - tl.load(bounds + 2 * segment)
        tl.store(entering + offset + at, state)
        state = state * tl.exp2(log_decay * count.to(tl.float32)) + tl.load(local + offset + at)
    tl.store(last + whole + at, state)


@dataclass(frozen=True)
class Segments:
    """How sequences are cut: bounds int64 [M, 2] of tokens, and int32 [N + 1] of segments."""

    bounds: torch.Tensor
    of_sequence: torch.Tensor
    is_cut: bool


def cut(cu_seqlens: torch.Tensor, num_tokens: int, num_heads: int, num_slices: int) -> Segments:
    """Choose segments without waiting for the device: unused ones at the end are empty."""
    cu_seqlens = cu_seqlens.long()
    num_sequences = cu_seqlens.numel() - 1
    device = cu_seqlens.device
    is_enough = num_sequences * num_heads * num_slices >= ENOUGH_PROGRAMS
    if is_enough or num_tokens <= SEGMENT_TOKENS:
        bounds = torch.stack((cu_seqlens[:-1], cu_seqlens[1:]), dim=1)
        whole = torch.arange(num_sequences + 1, device=device, dtype=torch.int32)
        return Segments(bounds.contiguous(), whole, is_cut=False)
    num_segments = num_tokens // SEGMENT_TOKENS + num_sequences
    count = -(-cu_seqlens.diff() // SEGMENT_TOKENS)
    ends = count.cumsum(0)
    number = torch.arange(num_segments, device=device)
    sequence = torch.searchsorted(ends, number, right=True)
    is_used = sequence < num_sequences
    sequence = sequence.clamp(max=num_sequences - 1)
    start = cu_seqlens[sequence] + (number - (ends - count)[sequence]) * SEGMENT_TOKENS
    end = torch.minimum(start + SEGMENT_TOKENS, cu_seqlens[sequence + 1])
    start, end = (torch.where(is_used, x, num_tokens) for x in (start, end))
    of_sequence = torch.cat((ends.new_zeros(1), ends)).int()
    return Segments(torch.stack((start, end), dim=1).contiguous(), of_sequence, is_cut=True)


def _walk(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    bounds: torch.Tensor,
    *,
    state: torch.Tensor | None = None,
    is_transposed: bool = False,
    backwards: bool = False,
    keep_state: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Outputs [T, H, E] (where q is given) and the states at the segments' ends (where kept)."""
    num_tokens, num_heads, head_dim = k.shape
    width, num_segments = v.shape[-1], bounds.shape[0]
    if q is not None and out is None:
        out = q.new_empty(num_tokens, num_heads, width)
    shape = (num_segments, num_heads, *((width, head_dim) if is_transposed else (head_dim, width)))
    end = torch.empty(shape, dtype=torch.float32, device=k.device) if keep_state else None
    slice_width = min(_SLICE, width)
    source = k if q is None else q
    target = k if out is None else out
    _walk_kernel[(width // slice_width, num_segments * num_heads)](
        source, k, v, target, slopes, bounds, k if state is None else state,
        k if end is None else end,
        *source.stride()[:2], *k.stride()[:2], *v.stride()[:2], *target.stride()[:2],
        NUM_HEADS=num_heads, D=head_dim, E=width, C=CHUNK, BE=slice_width, BACKWARDS=backwards,
        HAS_STATE=state is not None, IS_TRANSPOSED=is_transposed, KEEP_STATE=keep_state,
        WITH_OUTPUT=q is not None, PRECISION="tf32x3" if k.dtype == torch.float32 else "tf32",
        num_warps=4, num_stages=3 if k.dtype != torch.float32 else 1,
    )  # fmt: skip
    return out, end


def _scan(
    local: torch.Tensor,
    given: torch.Tensor | None,
    slopes: torch.Tensor,
    segments: Segments,
    *,
    backwards: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """States [M, H, *, *] that enter the segments, and those [N, H, *, *] after the sequences."""
    num_sequences = segments.of_sequence.numel() - 1
    num_heads, rows, columns = local.shape[1:]
    entering = torch.zeros_like(local)
    last = local.new_empty(num_sequences, num_heads, rows, columns)
    size, block = rows * columns, min(1024, rows * columns)
    _scan_kernel[(size // block, num_sequences * num_heads)](
        local, entering, last, local if given is None else given, slopes, segments.bounds,
        segments.of_sequence,
        NUM_HEADS=num_heads, SIZE=size, BLOCK=block, BACKWARDS=backwards,
        HAS_GIVEN=given is not None, num_warps=4,
    )  # fmt: skip
    return entering, last


class LightningAttentionFunction(torch.autograd.Function):
    """Autograd of the walks."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        slopes: torch.Tensor,
        cu_seqlens: torch.Tensor,
        initial_state: torch.Tensor | None,
        with_final_state: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out, final, state, segments = _attend(
            q, k, v, slopes, cu_seqlens, initial_state, with_final_state
        )
        ctx.save_for_backward(q, k, v, slopes, state)
        ctx.segments, ctx.has_initial = segments, initial_state is not None
        return out, final

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        q, k, v, slopes, state = ctx.saved_tensors
        into = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        d_out, d_final = grads
        d_initial = _gradients(
            q, k, v, slopes, ctx.segments, state, d_out, d_final, into,
            with_initial=ctx.has_initial,
        )  # fmt: skip
        return *into, None, None, d_initial, None


class LightningQkvFunction(torch.autograd.Function):
    """The same on SiLU of a fused projection [T, H, 3, D], which is kept instead of q, k and v."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, qkv: torch.Tensor, slopes: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        q, k, v = F.silu(qkv).unbind(2)
        out, _, state, segments = _attend(q, k, v, slopes, cu_seqlens, None, False)
        ctx.save_for_backward(qkv, slopes, state)
        ctx.segments = segments
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        qkv, slopes, state = ctx.saved_tensors
        q, k, v = F.silu(qkv).unbind(2)
        d_active = torch.empty_like(qkv)
        _gradients(
            q, k, v, slopes, ctx.segments, state, grads[0], None, d_active.unbind(2),
            with_initial=False,
        )  # fmt: skip
        return torch.ops.aten.silu_backward(d_active, qkv), None, None


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None,
    with_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, Segments]:
    """Outputs, final states, the states that enter the segments, and the segments."""
    segments = cut(cu_seqlens, q.shape[0], q.shape[1], v.shape[-1] // min(_SLICE, v.shape[-1]))
    state, final = initial_state, None
    if segments.is_cut:
        _, local = _walk(None, k, v, slopes, segments.bounds, keep_state=True)
        assert local is not None
        state, final = _scan(local, initial_state, slopes, segments)
    keep = with_final_state and not segments.is_cut
    out, end = _walk(q, k, v, slopes, segments.bounds, state=state, keep_state=keep)
    assert out is not None
    return out, (final if segments.is_cut else end) if with_final_state else None, state, segments


def _gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    segments: Segments,
    state: torch.Tensor | None,
    d_out: torch.Tensor | None,
    d_final: torch.Tensor | None,
    into: Sequence[torch.Tensor],
    *,
    with_initial: bool,
) -> torch.Tensor | None:
    """Write dq, dk and dv; returns the gradient of the initial state."""
    assert d_out is not None
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    bounds = segments.bounds
    dq, dk, dv = into
    _walk(d_out, v, k, slopes, bounds, state=state, is_transposed=True, out=dq)
    adjoint, d_initial = None if d_final is None else d_final.contiguous(), None
    if segments.is_cut:
        _, local = _walk(None, q, d_out, slopes, bounds, backwards=True, keep_state=True)
        assert local is not None
        adjoint, d_initial = _scan(local, adjoint, slopes, segments, backwards=True)
    keep = with_initial and not segments.is_cut
    _, end = _walk(
        k, q, d_out, slopes, bounds, state=adjoint, backwards=True, keep_state=keep, out=dv
    )
    _walk(v, d_out, q, slopes, bounds, state=adjoint, is_transposed=True, backwards=True, out=dk)
    if not with_initial:
        return None
    return d_initial if segments.is_cut else end


def lightning_attention_qkv_triton(
    qkv: torch.Tensor, slopes: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """Lightning attention of q, k, v = SiLU(qkv): outputs [T, H, D].

    Args:
        qkv: [T, H, 3, D], contiguous.
        slopes: float32 [H].
        cu_seqlens: int [N + 1].
    """
    return LightningQkvFunction.apply(qkv, slopes, cu_seqlens)  # type: ignore[no-any-return]


def lightning_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal lightning attention over packed sequences, differentiable in q, k, v and the state.

    Args:
        q: [T, H, D], D a power of two from 16 to 256; tokens and heads may be strided.
        k: [T, H, D].
        v: [T, H, E].
        slopes: float32 [H].
        cu_seqlens: int [N + 1].
        initial_state: float32 [N, H, D, E], or None for zeros.
        output_final_state: Also return the states after the sequences.

    Returns:
        Outputs [T, H, E] in q's dtype, and float32 [N, H, D, E] or None.
    """
    state = initial_state.contiguous() if initial_state is not None else None
    return LightningAttentionFunction.apply(  # type: ignore[no-any-return]
        q, k, v, slopes, cu_seqlens, state, output_final_state
    )
