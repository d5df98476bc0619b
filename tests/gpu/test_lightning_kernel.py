"""The Triton kernels on a GPU against float64, at the sizes and types that training uses.

Memory that nothing wrote is NaN in every test here. Shapes: T tokens, H heads, D head dim.
"""

import pytest
import torch
import torch.nn.functional as F

from m1_kernels.lightning_attention import (
    copy_state,
    lightning_attention,
    lightning_attention_prefill,
    lightning_attention_qkv,
    lightning_attention_step,
    lightning_slopes,
    reference,
)

# Measured on an H100: at most 3.0e-3 for bf16 and 2e-6 for fp32.
TOLERANCE = {torch.bfloat16: 3.5e-3, torch.float16: 1e-3, torch.float32: 1e-5}
MIXTURES = ([70, 1, 64, 300], [2, 4000, 94], [1] * 65, [1000, 63, 0, 65])


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int().cuda()


def draw(*shape, seed, dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def exact(q, k, v, slopes, cu_seqlens, state):
    """Outputs and final states in float64; `chunked` is held against the recurrence on a CPU."""
    out = reference.chunked(q, k, v, slopes.double(), cu_seqlens, state, chunk=128)
    return out, reference.final_states(k, v, slopes.double(), cu_seqlens, state)


def check(lengths, *, heads, dtype, layer=0, dim=128, options=None):
    total, shape = sum(lengths), (len(lengths), heads, dim, dim)
    slopes = lightning_slopes(heads, layer_index=layer, num_layers=80).cuda()
    fused = draw(total, heads, 3, dim, seed=1, dtype=dtype)  # strided, as the projection leaves it
    initial, d_final = draw(*shape, seed=2), draw(*shape, seed=3)
    d_out, cu_seqlens = draw(total, heads, dim, seed=4, dtype=dtype), bounds(lengths)

    doubles = [x.double().requires_grad_() for x in (*fused.unbind(2), initial)]
    wanted = exact(*doubles[:3], slopes, cu_seqlens, doubles[3])
    torch.autograd.backward(wanted, (d_out.double(), d_final.double()))
    given = [x.detach().requires_grad_() for x in (*fused.unbind(2), initial)]
    found = lightning_attention(
        *given[:3], slopes, cu_seqlens, initial_state=given[3], output_final_state=True,
        **(options or {}),
    )  # fmt: skip
    torch.autograd.backward(found, (d_out, d_final))
    names = ("out", "final", "dq", "dk", "dv", "d_initial")
    found, wanted = [*found, *(x.grad for x in given)], [*wanted, *(x.grad for x in doubles)]
    errors = {
        name: relative(a.detach(), b.detach())
        for name, a, b in zip(names, found, wanted, strict=True)
    }
    assert max(errors.values()) <= TOLERANCE[dtype], errors


@pytest.mark.parametrize("layer", [0, 79])
@pytest.mark.parametrize("heads", [1, 8, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 1000, 4096])
def test_one_sequence_equals_float64(length, dtype, heads, layer):
    check([length], heads=heads, dtype=dtype, layer=layer)


@pytest.mark.parametrize("layer", [0, 79])
@pytest.mark.parametrize("heads", [1, 8, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_long_sequence_equals_float64(dtype, heads, layer):
    total = 65_536
    slopes = lightning_slopes(heads, layer_index=layer, num_layers=80).cuda()
    fused = draw(total, heads, 3, 128, seed=1, dtype=dtype)
    initial, d_final = (draw(1, heads, 128, 128, seed=n) for n in (2, 3))
    d_out, cu_seqlens = draw(total, heads, 128, seed=4, dtype=dtype), bounds([total])
    given = [x.detach().requires_grad_() for x in (*fused.unbind(2), initial)]
    found = lightning_attention(
        *given[:3], slopes, cu_seqlens, initial_state=given[3], output_final_state=True
    )
    torch.autograd.backward(found, (d_out, d_final))
    found = [x.detach() for x in (*found, *(x.grad for x in given))]
    errors, norms = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for first in range(0, heads, 8):  # heads do not meet, and eight of them fit in float64
        some = slice(first, first + 8)
        doubles = [x.detach()[:, some].double().requires_grad_() for x in given]
        wanted = exact(*doubles[:3], slopes[some], cu_seqlens, doubles[3])
        gradients = d_out[:, some].double(), d_final[:, some].double()
        torch.autograd.backward(wanted, gradients)
        wanted = [x.detach() for x in (*wanted, *(x.grad for x in doubles))]
        for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
            errors[number] += (ours[:, some].double() - theirs).square().sum().cpu()
            norms[number] += theirs.square().sum().cpu()
    assert (errors / norms).sqrt().max() <= TOLERANCE[dtype], (errors / norms).sqrt()


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("layer", [0, 79])
@pytest.mark.parametrize("heads", [1, 8, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("lengths", MIXTURES, ids=str)
def test_packed_sequences_equal_float64(lengths, dtype, heads, layer, batch_invariant):
    options = {"batch_invariant": batch_invariant}
    check(lengths, heads=heads, dtype=dtype, layer=layer, options=options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_head_dims_equal_float64(dim, dtype):
    check([63, 2, 700], heads=2, dtype=dtype, dim=dim)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_fused_projection_equals_float64(dtype):
    lengths = [70, 1, 64, 3000]
    qkv = draw(sum(lengths), 4, 3, 128, seed=1, dtype=dtype).requires_grad_()
    d_out = draw(sum(lengths), 4, 128, seed=2, dtype=dtype)
    slopes, cu_seqlens = lightning_slopes(4, layer_index=3, num_layers=8).cuda(), bounds(lengths)
    doubles = qkv.detach().double().requires_grad_()
    # The activation is rounded to the input's type, in the model as here.
    rounded = (F.silu(qkv.detach()).double() - F.silu(doubles)).detach() + F.silu(doubles)
    wanted = reference.chunked(*rounded.unbind(2), slopes.double(), cu_seqlens, chunk=128)
    wanted.backward(d_out.double())
    found = lightning_attention_qkv(qkv, slopes, cu_seqlens)
    found.backward(d_out)
    assert relative(found.detach(), wanted.detach()) <= TOLERANCE[dtype]
    assert relative(qkv.grad, doubles.grad) <= TOLERANCE[dtype]


def test_steps_do_not_drift_over_64k_tokens():
    total, heads = 65_536, 64
    slopes = lightning_slopes(heads, layer_index=79, num_layers=80).cuda()
    q, k, v = (draw(1, total, heads, 128, seed=seed) for seed in range(3))
    states = torch.zeros(1, heads, 128, 128, device="cuda")
    lightning_attention_step(q, k, v, slopes, states)
    wanted = reference.final_states(k[0], v[0], slopes, bounds([total]))  # no decay is repeated
    assert relative(states, wanted.double()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("layer", [0, 40, 79])
def test_the_error_does_not_grow_up_to_a_million_tokens(layer):
    total, heads, piece = 1 << 20, 2, 4096
    slopes = lightning_slopes(64, layer_index=layer, num_layers=80)[[0, 63]].cuda()
    q, k, v, d_out = (draw(total, heads, 128, seed=n, dtype=torch.bfloat16) for n in range(4))
    given = [x.requires_grad_() for x in (q, k, v)]
    found, final = lightning_attention(*given, slopes, bounds([total]), output_final_state=True)
    found.backward(d_out)
    with torch.no_grad():
        errors, state = by_piece(found, (q, k, v), slopes, piece)
        backward, _ = by_piece(
            v.grad.flip(0), [x.flip(0) for x in (k, q, d_out)], slopes, piece
        )  # dv_t = k_t G_t, a recurrence from the end
    for name, found_errors in (("out", errors), ("dv", backward)):
        assert max(found_errors) <= TOLERANCE[torch.bfloat16], name
        assert max(found_errors) <= 1.15 * found_errors[0], (name, found_errors[0])
    assert relative(final, state) <= TOLERANCE[torch.bfloat16]


def by_piece(found, tensors, slopes, piece):
    """Relative error of every piece of a sequence against float64, and the final state."""
    state, errors, cu_seqlens = None, [], bounds([piece])
    for rows in zip(found.split(piece), *(x.split(piece) for x in tensors), strict=True):
        q, k, v = (x.double() for x in rows[1:])
        wanted, state = exact(q, k, v, slopes, cu_seqlens, state)
        errors.append(relative(rows[0], wanted))
    return errors, state


def test_offsets_beyond_two_to_the_31_are_right():
    total, heads = 300_000, 64  # 2.5e9 elements in each of q, k and v
    q, k, v = (draw(total, heads, 128, seed=n, dtype=torch.bfloat16) for n in range(3))
    slopes = lightning_slopes(heads, layer_index=20, num_layers=80).cuda()
    out, _ = lightning_attention(q, k, v, slopes, bounds([total - 200, 200]))
    tail = [x[-200:] for x in (q, k, v)]
    wanted, _ = exact(*(x.double() for x in tail), slopes, bounds([200]), None)
    assert relative(out[-200:], wanted) <= TOLERANCE[torch.bfloat16]


def test_results_do_not_depend_on_the_run():
    slopes, cu_seqlens = (
        lightning_slopes(2, layer_index=1, num_layers=8).cuda(),
        bounds([4000, 1000]),
    )
    given = [draw(5000, 2, 128, seed=n, dtype=torch.bfloat16).requires_grad_() for n in range(3)]
    d_out = draw(5000, 2, 128, seed=3, dtype=torch.bfloat16)

    def run():
        out, final = lightning_attention(*given, slopes, cu_seqlens, output_final_state=True)
        return out.detach(), final.detach(), *torch.autograd.grad(out, given, d_out)

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_a_sequence_alone_and_packed_agree_bitwise_when_batch_invariant():
    lengths = [300, 5000, 64]
    slopes, rows = lightning_slopes(8, layer_index=1, num_layers=8).cuda(), slice(300, 5300)
    tensors = [draw(5364, 8, 128, seed=n, dtype=torch.bfloat16) for n in range(4)]

    def run(rows, cu_seqlens):
        given = [x[rows].clone().requires_grad_() for x in tensors[:3]]
        out, _ = lightning_attention(*given, slopes, cu_seqlens, batch_invariant=True)
        return out.detach(), *torch.autograd.grad(out, given, tensors[3][rows])

    packed, alone = run(slice(None), bounds(lengths)), run(rows, bounds([5000]))
    assert all(torch.equal(a[rows], b) for a, b in zip(packed, alone, strict=True))


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_prefill_copies_and_steps_continue_a_sequence_inside_a_cuda_graph(num_tokens):
    heads, length, group, dtype = 8, 1000, 4, torch.bfloat16
    slopes = lightning_slopes(heads, layer_index=3, num_layers=80).cuda()
    qkv = draw(length + num_tokens, heads, 3, 128, seed=1, dtype=dtype)
    states = torch.zeros(group + 2, heads, 128, 128, device="cuda")
    prompt, tokens = (x.unbind(2) for x in (qkv[:length], qkv[length:]))
    slots = torch.tensor([5], device="cuda")
    lightning_attention_prefill(*prompt, slopes, bounds([length]), states, slots)
    copy_state(states, slots, torch.arange(group, device="cuda"))
    rows = [x.expand(group, *x.shape).contiguous() for x in tokens]
    places = torch.tensor([2, 0, -1, 1], device="cuda")
    lightning_attention_step(*rows, slopes, states.clone(), places)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lightning_attention_step(*rows, slopes, states, places)
    before = states.clone()
    graph.replay()
    wanted, final = exact(*(x.double() for x in qkv.unbind(2)), slopes, bounds([len(qkv)]), None)
    for row, place in ((0, 2), (1, 0), (3, 1)):
        assert relative(out[row], wanted[length:]) <= TOLERANCE[dtype]
        assert relative(states[place], final[0]) <= TOLERANCE[dtype]
    assert torch.count_nonzero(out[2]) == 0
    assert torch.equal(states[3:], before[3:])


def test_a_row_steps_bitwise_alike_alone_and_in_a_batch_when_batch_invariant():
    slopes = lightning_slopes(4, layer_index=1, num_layers=8).cuda()
    states = draw(64, 4, 128, 128, seed=0)
    q, k, v = draw(3, 64, 4, 128, seed=1, dtype=torch.bfloat16).unbind(0)
    before = states.clone()
    packed = lightning_attention_step(q, k, v, slopes, states, batch_invariant=True)
    row = [x[7:8] for x in (q, k, v)]
    alone = lightning_attention_step(*row, slopes, before[7:8], batch_invariant=True)
    assert torch.equal(packed[7:8], alone)
    assert torch.equal(states[7], before[7])


def test_a_captured_graph_follows_new_bounds():
    slopes = lightning_slopes(8, layer_index=3, num_layers=80).cuda()
    q, k, v = (draw(6000, 8, 128, seed=n, dtype=torch.bfloat16) for n in range(3))
    cu_seqlens = bounds([5000, 1000])
    lightning_attention(q, k, v, slopes, cu_seqlens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = lightning_attention(q, k, v, slopes, cu_seqlens)
    for lengths in ([5000, 1000], [64, 5936]):
        cu_seqlens.copy_(bounds(lengths))
        graph.replay()
        assert torch.equal(out, lightning_attention(q, k, v, slopes, bounds(lengths))[0])


def test_the_layer_compiles_without_a_graph_break():
    slopes, cu_seqlens = lightning_slopes(4, layer_index=3, num_layers=8).cuda(), bounds([100, 28])
    qkv = draw(128, 4, 3, 128, seed=1, dtype=torch.bfloat16).requires_grad_()

    def work(qkv):
        return lightning_attention_qkv(qkv, slopes, cu_seqlens) * 2

    found = torch.compile(work, fullgraph=True)(qkv)
    (grad,) = torch.autograd.grad(found.sum(), qkv)
    expected = work(qkv)
    assert torch.equal(found, expected)
    assert torch.equal(grad, torch.autograd.grad(expected.sum(), qkv)[0])


def test_autocast_casts_inputs_and_keeps_states():
    slopes = lightning_slopes(2, layer_index=3, num_layers=8).cuda()
    q, k, v = (draw(50, 2, 128, seed=n).requires_grad_() for n in range(3))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out, final = lightning_attention(q, k, v, slopes, bounds([50]), output_final_state=True)
    assert out.dtype == torch.bfloat16 and final.dtype == torch.float32
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32
    half = (x.detach().bfloat16() for x in (q, k, v))
    assert torch.equal(out, lightning_attention(*half, slopes, bounds([50]))[0])


@pytest.mark.parametrize("name", ["slopes", "cu_seqlens"])
def test_the_debug_switch_finds_bad_values_on_the_device(monkeypatch, name):
    monkeypatch.setenv("M1_KERNELS_DEBUG", "1")
    given = {"slopes": torch.tensor([0.1, 0.2]).cuda(), "cu_seqlens": bounds([3, 5])}
    given[name][1] = -1
    q = draw(8, 2, 128, seed=1)
    with pytest.raises(ValueError, match=name):
        lightning_attention(q, q, q, **given)


def test_a_head_dim_outside_the_list_is_refused():
    q = draw(8, 2, 80, seed=1)
    with pytest.raises(ValueError, match="head dim 80; the kernels take 16, 32, 64, 96, 128, 256"):
        lightning_attention(q, q, q, torch.ones(2).cuda(), bounds([8]))
