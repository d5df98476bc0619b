"""The Triton kernels against the float64 recurrence: on a GPU, or interpreted on a CPU.

The interpreter multiplies in float32 whatever the input, and cuts float32 off to bf16 where a GPU
rounds to nearest: its bf16 errors are those of the outputs' last bit. Shapes: T tokens, N
sequences, H heads, D key dims, E value dims.
"""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from m1_kernels.lightning_attention import chunk, decode, lightning_slopes, ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Measured on a CPU: at most 3e-7 for fp32, 4e-4 for fp16 and 3.0e-3 for bf16.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 3.5e-3}
SLOPES = {"first layer": (0.92,), "last layer": (4e-8,), "none and steep": (0.0, 3.0)}
slope_kinds = pytest.mark.parametrize("slopes", SLOPES.values(), ids=SLOPES.keys())


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)


def draw(*shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture(params=["whole", "cut"])
def segments(request, monkeypatch):
    if request.param == "cut":
        monkeypatch.setattr(chunk, "SEGMENT_TOKENS", (64, 64))
        monkeypatch.setattr(chunk, "ENOUGH_PROGRAMS", 1 << 30)
    return request.param


def check(lengths, slopes, *, key_dim=16, value_dim=16, dtype=torch.float32):
    """Outputs, states and every gradient, with states in and out."""
    total, heads = sum(lengths), len(slopes)
    shape = (len(lengths), heads, key_dim, value_dim)
    slopes, cu_seqlens = torch.tensor(slopes, device=DEVICE), bounds(lengths)
    inputs = [
        draw(total, heads, size, seed=seed, dtype=dtype)
        for seed, size in enumerate((key_dim, key_dim, value_dim))
    ]
    initial, d_final = draw(*shape, seed=3), draw(*shape, seed=4)
    d_out = draw(total, heads, value_dim, seed=5, dtype=dtype)

    exact = [x.double().requires_grad_() for x in (*inputs, initial)]
    out, final = reference.recurrent(*exact[:3], slopes, cu_seqlens, exact[3])
    ((out * d_out.double()).sum() + (final * d_final.double()).sum()).backward()
    wanted = [out, final, *(x.grad for x in exact)]

    given = [x.requires_grad_() for x in (*inputs, initial)]
    out, final, _ = ops.attention(*given[:3], slopes, cu_seqlens, given[3], True, False)
    assert out.dtype == dtype and final.dtype == torch.float32
    torch.autograd.backward((out, final), (d_out, d_final))
    found = [out, final, *(x.grad for x in given)]
    names = ("out", "final", "dq", "dk", "dv", "d_initial")
    errors = {
        name: relative(a.detach(), b.detach())
        for name, a, b in zip(names, found, wanted, strict=True)
    }
    assert max(errors.values()) <= TOLERANCE[dtype], errors


@slope_kinds
def test_packed_sequences_with_states_equal_the_recurrence(segments, slopes):
    check([63, 1, 130, 0], slopes)


@pytest.mark.parametrize("length", [1, 2, 63, 65, 127])
def test_odd_lengths_equal_the_recurrence(length):
    check([length], (0.5,))


@pytest.mark.parametrize(
    ("slope", "lengths"), [(1.5, [70, 9]), (10.0, [9, 14]), (40.0, [3, 7])], ids=str
)
def test_steep_slopes_equal_the_recurrence(slope, lengths):
    check(lengths, (slope,))  # chunks of 32, 8 and 2 tokens


def test_total_decay_leaves_only_the_token_itself():
    q, k, v = (draw(40, 1, 16, seed=n) for n in range(3))
    slopes, state = torch.tensor([1e4], device=DEVICE), draw(1, 1, 16, 16, seed=3)
    out, final, _ = ops.attention(q, k, v, slopes, bounds([40]), state, True, False)
    assert relative(out, (q.double() * k).sum(-1, keepdim=True) * v) <= 1e-6
    assert relative(final[0, 0], k[-1, 0, :, None].double() * v[-1, 0, None, :]) <= 1e-6


@pytest.mark.parametrize(("key_dim", "value_dim"), [(96, 40), (32, 64)])
def test_head_dims_equal_the_recurrence(key_dim, value_dim):
    check([66], (0.7,), key_dim=key_dim, value_dim=value_dim)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_equals_the_recurrence(segments, dtype):
    check([100, 33], (0.92, 1e-3), dtype=dtype)


def test_the_fused_projection_equals_silu_then_the_recurrence(segments):
    lengths, heads, dim = [70, 3], 2, 16
    qkv = draw(sum(lengths), heads, 3, dim, seed=0).requires_grad_()
    d_out, slopes = draw(sum(lengths), heads, dim, seed=1), torch.tensor([0.92, 1e-3])
    exact = qkv.detach().double().requires_grad_()
    expected, _ = reference.recurrent(*F.silu(exact).unbind(2), slopes.to(DEVICE), bounds(lengths))
    expected.backward(d_out.double())
    out, *_ = ops.attention_qkv(qkv, slopes.to(DEVICE), bounds(lengths), False)
    out.backward(d_out)
    assert relative(out.detach(), expected.detach()) <= TOLERANCE[torch.float32]
    assert relative(qkv.grad, exact.grad) <= TOLERANCE[torch.float32]


def test_a_sequence_alone_and_packed_agree_bitwise_when_batch_invariant(monkeypatch):
    monkeypatch.setattr(chunk, "SEGMENT_TOKENS", (64, 64))
    monkeypatch.setattr(chunk, "ENOUGH_PROGRAMS", 6)
    lengths, slopes = [3, 70, 5], lightning_slopes(2, layer_index=1, num_layers=8)
    q, k, v, d_out = (draw(sum(lengths), 2, 16, seed=n) for n in range(4))
    rows = slice(3, 73)

    def run(rows, cu_seqlens, invariant):
        given = [x[rows].clone().requires_grad_() for x in (q, k, v)]
        out, final, _ = ops.attention(*given, slopes.to(DEVICE), cu_seqlens, None, True, invariant)
        out.backward(d_out[rows])
        return out.detach(), final.detach(), *(x.grad for x in given)

    packed = run(slice(None), bounds(lengths), True)
    alone = run(rows, bounds([70]), True)
    for name, a, b in zip(("out", "final", "dq", "dk", "dv"), packed, alone, strict=True):
        assert torch.equal(a[1:2] if name == "final" else a[rows], b), name
    # Without the flag three sequences are enough programs and one is not: the sums differ.
    assert not torch.equal(
        run(slice(None), bounds(lengths), False)[0][rows], run(rows, bounds([70]), False)[0]
    )


def test_neighbours_that_are_not_finite_stay_outside(segments):
    lengths = [70, 5, 3]
    slopes, cu_seqlens = torch.tensor([0.5], device=DEVICE), bounds(lengths)
    tensors = [draw(78, 1, 16, seed=n) for n in range(3)]
    clean, final, _ = ops.attention(*tensors, slopes, cu_seqlens, None, True, False)
    for x in tensors:
        x[70:75] = float("nan")
    dirty, dirty_final, _ = ops.attention(*tensors, slopes, cu_seqlens, None, True, False)
    others = [*range(70), *range(75, 78)]
    assert torch.equal(clean[others], dirty[others])
    assert torch.equal(final[[0, 2]], dirty_final[[0, 2]])
    assert dirty[70:75].isnan().all()


def test_prefill_writes_final_states_into_slots(segments):
    lengths = [70, 5, 2]
    slopes, cu_seqlens = torch.tensor([0.5, 1e-4], device=DEVICE), bounds(lengths)
    q, k, v = (draw(77, 2, 16, seed=n) for n in range(3))
    states = torch.full((5, 2, 16, 16), float("nan"), device=DEVICE)
    slots = torch.tensor([3, -1, 0], device=DEVICE)
    ops.attention_prefill(q, k, v, slopes, cu_seqlens, states, slots, None, False)
    _, final = reference.recurrent(q, k, v, slopes, cu_seqlens)
    assert relative(states[[3, 0]], final[[0, 2]]) <= TOLERANCE[torch.float32]
    assert states[[1, 2, 4]].isnan().all()


@pytest.mark.parametrize("many_rows", [4, 5], ids=["wide tiles", "narrow tiles"])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_steps_update_their_slots_and_no_others(monkeypatch, num_tokens, many_rows):
    monkeypatch.setattr(decode, "_MANY_ROWS", many_rows)
    shape, slopes = (4, num_tokens, 2, 3, 16), torch.tensor([0.5, 60.0], device=DEVICE)
    qkv, states = draw(*shape, seed=0), draw(6, 2, 16, 16, seed=1)
    slots = torch.tensor([5, 0, -1, 2], device=DEVICE)
    q, k, v = qkv.unbind(3)
    before, expected = states.clone(), states.clone()
    wanted = reference.step(F.silu(q), F.silu(k), F.silu(v), slopes, expected, slots)
    out = decode.attention_step(q, k, v, slopes, states, slots, True)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(states[[1, 3, 4]], before[[1, 3, 4]])
    assert torch.count_nonzero(out[2]) == 0


@pytest.mark.parametrize("step", [decode.attention_step, reference.step], ids=["kernel", "torch"])
def test_steps_do_not_round_a_slow_decay_the_same_way_every_time(step):
    """exp(-slope) in float32 alone is off by up to 6e-8 a token: 5e-6 here."""
    num_tokens, slopes = 256, torch.tensor([4e-8, 9e-8, 3e-4], device=DEVICE)
    q, k, v = (draw(1, num_tokens, 3, 4, seed=seed) for seed in range(3))
    states = 64 * draw(1, 3, 4, 4, seed=3)
    cu_seqlens = bounds([num_tokens])
    exact, final = reference.recurrent(q[0], k[0], v[0], slopes, cu_seqlens, states)
    options = (None, False) if step is decode.attention_step else ()
    out = step(q, k, v, slopes, states, *options)
    for head in range(3):
        assert relative(out[0, :, head], exact[:, head]) <= 1e-6
        assert relative(states[:, head], final[:, head]) <= 1e-6


CU_SEQLENS, SLOPE = bounds([2, 3]), torch.tensor([0.5], device=DEVICE)
SLOTS = torch.tensor([1, -1], device=DEVICE)
OPERANDS = {
    "lightning_attention": lambda x, state, d: (x, x, x, SLOPE, CU_SEQLENS, state, True, False),
    "lightning_attention_backward": lambda x, state, d: (
        *(x.detach(),) * 3, SLOPE, CU_SEQLENS, None, d, state.detach(), True, False,
    ),
    "lightning_attention_qkv": lambda x, state, d: (
        torch.stack((x, x, x), 2).detach().requires_grad_(), SLOPE, CU_SEQLENS, False,
    ),
    "lightning_attention_qkv_backward": lambda x, state, d: (
        *(torch.stack((x, x, x), 2).detach(),) * 2, SLOPE, CU_SEQLENS, None, d, False,
    ),
    "lightning_attention_prefill": lambda x, state, d: (
        *(x.detach(),) * 3, SLOPE, CU_SEQLENS, state.detach(), SLOTS, None, False,
    ),
    "lightning_attention_step": lambda x, state, d: (
        *(x.detach()[:2, None],) * 3, SLOPE, state.detach(), None, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERANDS)
def test_the_operators_keep_pytorchs_rules(name):
    x, d_out = draw(5, 1, 16, seed=0).requires_grad_(), draw(5, 1, 16, seed=2)
    operands = OPERANDS[name](x, draw(2, 1, 16, 16, seed=1).requires_grad_(), d_out)
    torch.library.opcheck(getattr(torch.ops.m1, name), operands)
