"""The Triton kernels of lightning attention: a walk over a segment, and a scan over segments.

One program walks a segment of one sequence for one head and a slice of the values, chunk by chunk,
with the state on chip. With lam = exp(-slope), i a token's place in its chunk and c the chunk's
middle, the decay lam^(i-j) is put about the middle as r_i c_j, r_i = lam^(i-c), c_j = lam^(c-j):

    o_i = r_i (q_i A + sum_{j <= i} (q_i k_j) c_j v_j),     A <- lam^C (A + sum_j k_j^T c_j v_j),

A = lam^(c+1) S, so no decay matrix is made. The gradients are walks too: with G_t = q_t^T do_t +
lam G_{t+1} the adjoint of the state,

    dq_t = do_t S_t^T (forwards over do, v, k),  dk_t = v_t G_t^T and dv_t = k_t G_t (backwards).

A decay near one is kept as a sum 1 + lost: rounded to one float, it would be off the same way in
every chunk, which adds up to 2e-5 of a state over 64K tokens in the slowest head of the last layer.

Where a slope is so steep that lam^(C/2) would leave float32, the walk takes fewer tokens per chunk,
down to one, so every slope from 0 up is exact.

Whole chunks are walked without masks along the tokens, with loads ahead; those of fewer tokens
(at most one, unless the slope is steep) on their own, last forwards and first backwards. Strides
are known when the kernel is compiled, once for each layout.

Segments and sequences are numbered on the device: sequence n of `cu_seqlens` owns the numbers from
start_n // L + n on, L tokens per segment; some numbers stay empty. So nothing waits for the device.

Shapes: T tokens, N sequences, M segments, H heads, D key dims, E value dims, C tokens per chunk.
"""

import triton
import triton.language as tl

CHUNK = 64
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_MAX_EXPONENT = tl.constexpr(48.0)
"""Bits that a factor r_i or c_j may span, so that products with inputs stay inside bfloat16."""
_MAX_LOG_DECAY = tl.constexpr(64.0)


@triton.jit
def load_log_decay(slopes, head):
    """log2 of lam, at least -64: what a token leaves to the next is below float32's precision."""
    return -tl.minimum(tl.load(slopes + head) * _LOG2_E, _MAX_LOG_DECAY)


@triton.jit
def chunk_tokens(log_decay, C: tl.constexpr):
    """Tokens per chunk: C, halved while lam^(C/2) is below 2^-48, down to 1."""
    count = tl.full((), C, tl.int32)
    for _ in tl.static_range(0, 6):
        count = tl.where(-log_decay * (count // 2) > _MAX_EXPONENT, count // 2, count)
    return count


@triton.jit
def decay_parts(x):
    """(keep, lost) with exp(x) = keep + lost for x <= 0: (1, expm1(x)) near 0, else (exp(x), 0)."""
    series = 1.0 + x / 8.0
    for n in tl.static_range(7, 1, -1):
        series = 1.0 + x / n * series
    is_near = x > -0.5
    return tl.where(is_near, 1.0, tl.exp(x)), tl.where(is_near, x * series, 0.0)


@triton.jit
def find_segment(number, cu_seqlens, num_sequences, segment_tokens, N_POWER: tl.constexpr):
    """Sequence of segment `number`, its first token, and its tokens (0: the number is unused)."""
    n = tl.arange(0, N_POWER)
    is_sequence = n < num_sequences
    starts = tl.load(cu_seqlens + n, mask=is_sequence, other=0).to(tl.int64)
    owns = is_sequence & (starts // segment_tokens + n <= number)
    sequence = tl.sum(owns.to(tl.int32), axis=0) - 1
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    place = number - (begin // segment_tokens + sequence)
    first = begin + place * segment_tokens
    length = tl.maximum(tl.minimum(segment_tokens, end - first), 0).to(tl.int32)
    return sequence, first, length


@triton.jit
def _load(at, is_row, is_column, MASK_ROWS: tl.constexpr, ALL_COLUMNS: tl.constexpr):
    if MASK_ROWS:
        return tl.load(at, mask=is_row[:, None] & is_column[None, :], other=0.0)
    elif ALL_COLUMNS:
        return tl.load(at)
    else:
        return tl.load(at, mask=is_column[None, :], other=0.0)


@triton.jit
def _store(at, x, is_row, is_column, MASK_ROWS: tl.constexpr, ALL_COLUMNS: tl.constexpr):
    x = x.to(at.dtype.element_ty)
    if MASK_ROWS:
        tl.store(at, x, mask=is_row[:, None] & is_column[None, :])
    elif ALL_COLUMNS:
        tl.store(at, x)
    else:
        tl.store(at, x, mask=is_column[None, :])


@triton.jit
def _chunk(
    q_at, k_at, v_at, o_at, token, left, a, keep, lost, row_scale, col_scale, visible, i,
    is_d, is_e,
    stride_qt: tl.constexpr, stride_kt: tl.constexpr, stride_vt: tl.constexpr,
    stride_ot: tl.constexpr,
    ALL_D: tl.constexpr, ALL_E: tl.constexpr, MASK_ROWS: tl.constexpr,
    WITH_OUTPUT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the outputs of the `left` tokens from `token` on; returns the state after them."""
    is_row = i < left
    at = token.to(tl.int64)
    k_c = _load(k_at + at * stride_kt, is_row, is_d, MASK_ROWS, ALL_D).to(COMPUTE)
    v_c = _load(v_at + at * stride_vt, is_row, is_e, MASK_ROWS, ALL_E).to(COMPUTE)
    v_c = (v_c * col_scale[:, None]).to(COMPUTE)
    if WITH_OUTPUT:
        q_c = _load(q_at + at * stride_qt, is_row, is_d, MASK_ROWS, ALL_D).to(COMPUTE)
        scores = tl.dot(q_c, tl.trans(k_c), input_precision=PRECISION)
        o_c = tl.dot(q_c, a.to(COMPUTE), input_precision=PRECISION)
        scores = tl.where(visible, scores, 0.0).to(COMPUTE)
        o_c = tl.dot(scores, v_c, o_c, input_precision=PRECISION) * row_scale[:, None]
        _store(o_at + at * stride_ot, o_c, is_row, is_e, MASK_ROWS, ALL_E)
    a = tl.dot(tl.trans(k_c), v_c, a, input_precision=PRECISION)
    return a * keep + a * lost


@triton.jit
def walk_kernel(
    q, k, v, out, slopes, cu_seqlens, state_in, state_out, state_slots,
    num_sequences, num_heads, segment_tokens,
    stride_qt: tl.constexpr, stride_qh: tl.constexpr, stride_kt: tl.constexpr,
    stride_kh: tl.constexpr, stride_vt: tl.constexpr, stride_vh: tl.constexpr,
    stride_ot: tl.constexpr, stride_oh: tl.constexpr,
    D: tl.constexpr, D_POWER: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BE: tl.constexpr,
    N_POWER: tl.constexpr, IS_CUT: tl.constexpr,
    BACKWARDS: tl.constexpr, HAS_STATE: tl.constexpr, IS_TRANSPOSED: tl.constexpr,
    KEEP_STATE: tl.constexpr, HAS_SLOTS: tl.constexpr, WITH_OUTPUT: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """Walk one segment; `WITH_OUTPUT` false only carries the state to its end.

    The state enters a forward walk as S before the first token, so the first token sees lam S. It
    enters a backward walk as the adjoint of the state after the last token, which sees it
    undecayed, and leaves as that of the state before the first, lam G.
    """
    slice_e = tl.program_id(0)
    segment = tl.program_id(1) // num_heads
    head = tl.program_id(1) % num_heads
    if IS_CUT:
        sequence, first, length = find_segment(
            segment, cu_seqlens, num_sequences, segment_tokens, N_POWER
        )
    else:
        sequence = segment
        first = tl.load(cu_seqlens + segment).to(tl.int64)
        length = (tl.load(cu_seqlens + segment + 1).to(tl.int64) - first).to(tl.int32)
    log_decay = load_log_decay(slopes, head)
    count = chunk_tokens(log_decay, C)
    middle = (count // 2).to(tl.float32)
    i = tl.arange(0, C)
    place = i.to(tl.float32)
    num_chunks = (length + count - 1) // count
    in_last = (length - (num_chunks - 1) * count).to(tl.float32)
    is_here = i < count
    from_middle = tl.where(is_here, place - middle, 0.0)
    if BACKWARDS:
        row_scale = tl.exp2(-log_decay * from_middle)
        col_scale = tl.exp2(log_decay * from_middle)
        entering = tl.exp2(log_decay * (in_last - 1 - middle))
        leaving = tl.exp2(-log_decay * (count.to(tl.float32) - middle - 1))
        visible = i[None, :] >= i[:, None]
    else:
        row_scale = tl.exp2(log_decay * from_middle)
        col_scale = tl.exp2(-log_decay * from_middle)
        entering = tl.exp2(log_decay * (middle + 1))
        leaving = tl.exp2(-log_decay * (middle + 1))
        visible = i[:, None] >= i[None, :]
    d = tl.arange(0, D_POWER)
    e = slice_e * BE + tl.arange(0, BE)
    is_d, is_e = d < D, e < E
    far = head.to(tl.int64)  # heads may lie more than 2^31 elements apart
    q_at = q + first * stride_qt + far * stride_qh + i[:, None] * stride_qt + d[None, :]
    k_at = k + first * stride_kt + far * stride_kh + i[:, None] * stride_kt + d[None, :]
    v_at = v + first * stride_vt + far * stride_vh + i[:, None] * stride_vt + e[None, :]
    o_at = out + first * stride_ot + far * stride_oh + i[:, None] * stride_ot + e[None, :]
    if IS_TRANSPOSED:
        inner = e[None, :] * D + d[:, None]
    else:
        inner = d[:, None] * E + e[None, :]
    is_inner = is_d[:, None] & is_e[None, :]
    a = tl.zeros([D_POWER, BE], dtype=tl.float32)
    if HAS_STATE:
        state = (segment * num_heads + head).to(tl.int64) * (D * E)
        a = tl.load(state_in + state + inner, mask=is_inner, other=0.0) * entering
    num_whole = 0
    if PEEL:
        num_whole = tl.where(count == C, length // C, 0)
    keep, lost = decay_parts(log_decay * _LN_2 * count.to(tl.float32))
    if BACKWARDS:
        for step in tl.range(0, num_chunks - num_whole, num_stages=1):
            at = (num_chunks - 1 - step) * count
            a = _chunk(
                q_at, k_at, v_at, o_at, at, tl.minimum(length - at, count), a, keep, lost,
                row_scale, col_scale, visible, i, is_d, is_e,
                stride_qt, stride_kt, stride_vt, stride_ot,
                D == D_POWER, E % BE == 0, True, WITH_OUTPUT, COMPUTE, PRECISION,
            )  # fmt: skip
    if PEEL:
        for step in tl.range(0, num_whole, num_stages=STAGES):
            if BACKWARDS:
                chunk = num_whole - 1 - step
            else:
                chunk = step
            a = _chunk(
                q_at, k_at, v_at, o_at, chunk * C, C, a, keep, lost,
                row_scale, col_scale, visible, i, is_d, is_e,
                stride_qt, stride_kt, stride_vt, stride_ot,
                D == D_POWER, E % BE == 0, False, WITH_OUTPUT, COMPUTE, PRECISION,
            )  # fmt: skip
    if not BACKWARDS:
        for step in tl.range(num_whole, num_chunks, num_stages=1):
            at = step * count
            left = tl.minimum(length - at, count)
            last_keep, last_lost = decay_parts(log_decay * _LN_2 * left.to(tl.float32))
            a = _chunk(
                q_at, k_at, v_at, o_at, at, left, a, last_keep, last_lost,
                row_scale, col_scale, visible, i, is_d, is_e,
                stride_qt, stride_kt, stride_vt, stride_ot,
                D == D_POWER, E % BE == 0, True, WITH_OUTPUT, COMPUTE, PRECISION,
            )  # fmt: skip
    if KEEP_STATE:
        row = segment.to(tl.int64)
        if HAS_SLOTS:
            row = tl.load(state_slots + sequence).to(tl.int64)
        is_kept = is_inner & (row >= 0)
        if IS_CUT:
            is_kept = is_kept & (length > 0)
        tl.store(state_out + (row * num_heads + head) * (D * E) + inner, a * leaving, mask=is_kept)


@triton.jit
def scan_kernel(
    local, entering, last, given, slopes, cu_seqlens, state_slots, num_heads,
    segment_tokens,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, BACKWARDS: tl.constexpr,
    HAS_GIVEN: tl.constexpr, KEEP_LAST: tl.constexpr, HAS_SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """States that enter the segments of a sequence, and the one that leaves the last of them.

    Backwards, states are adjoints just before their segment's first token, lam G of it.
    """
    sequence = tl.program_id(1) // num_heads
    head = tl.program_id(1) % num_heads
    log_decay = load_log_decay(slopes, head)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_at = at < SIZE
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
    begin = start // segment_tokens + sequence
    num_segments = tl.cdiv(length, segment_tokens).to(tl.int32)
    state = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_GIVEN:
        whole = (sequence * num_heads + head).to(tl.int64) * SIZE
        state = tl.load(given + whole + at, mask=is_at, other=0.0)
    for step in tl.range(0, num_segments, num_stages=STAGES):
        if BACKWARDS:
            place = num_segments - 1 - step
        else:
            place = step
        offset = ((begin + place) * num_heads + head) * SIZE
        tokens = tl.minimum(length - place.to(tl.int64) * segment_tokens, segment_tokens)
        x = tl.load(local + offset + at, mask=is_at, other=0.0)
        tl.store(entering + offset + at, state, mask=is_at)
        keep, lost = decay_parts(log_decay * _LN_2 * tokens.to(tl.float32))
        state = state * keep + (state * lost + x)
    if KEEP_LAST:
        row = sequence.to(tl.int64)
        if HAS_SLOTS:
            row = tl.load(state_slots + sequence).to(tl.int64)
        tl.store(last + (row * num_heads + head) * SIZE + at, state, mask=is_at & (row >= 0))
