"""The reference against closed forms, and the chunked form against the reference.

Shapes: T tokens, H heads, D key dims, E value dims.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m1_kernels.lightning_attention import (
    lightning_attention,
    lightning_attention_step,
    lightning_slopes,
)
from m1_kernels.lightning_attention.reference import chunked, final_states, recurrent

ODD_LENGTHS = (1, 31, 32, 33, 63, 1000)
PACKINGS = ([1], [1, 1, 1], [33, 1, 31], [5, 64, 1, 96, 2], [1, 100, 32, 32, 7], [250, 1, 13])
SLOPES = {"steep": (40.0, 3.0), "usual": (0.5, 0.0625), "vanishing": (1e-5, 1e-9)}
slope_kinds = pytest.mark.parametrize("slopes", SLOPES.values(), ids=SLOPES.keys())


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def inputs(num_tokens, *, heads=2, key_dim=8, value_dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (key_dim, key_dim, value_dim)
    return [torch.randn(num_tokens, heads, size, generator=generator) for size in sizes]


def relative_error(actual, expected):
    return float((actual.double() - expected).abs().max() / expected.abs().max())


# float32 against float64. Measured: outputs 2e-7, gradients 3e-7, states 1e-6 (of 1000 tokens).
TOLERANCE = 2e-6


def test_ones_give_the_geometric_series():
    ones = torch.ones(50, 1, 1)
    decay = torch.exp(torch.tensor(-0.3, dtype=torch.float64))
    expected = (1 - decay ** torch.arange(1, 51)) / (1 - decay)
    slopes, cu_seqlens = torch.tensor([0.3]), bounds([50])
    out, final = recurrent(ones, ones, ones, slopes, cu_seqlens)
    torch.testing.assert_close(out[:, 0, 0], expected, rtol=1e-7, atol=0)  # slope 0.3 is float32
    torch.testing.assert_close(final.flatten(), expected[-1:], rtol=1e-7, atol=0)
    fast = chunked(ones, ones, ones, slopes, cu_seqlens)
    assert relative_error(fast[:, 0, 0], expected) < TOLERANCE


def test_without_decay_the_output_is_linear_attention():
    q, k, v = inputs(40)
    scores = torch.einsum("thd,shd->hts", q.double(), k.double()).tril()
    expected = torch.einsum("hts,she->the", scores, v.double())
    out, _ = recurrent(q, k, v, torch.zeros(2), bounds([40]))
    torch.testing.assert_close(out, expected)


def test_total_decay_leaves_only_the_token_itself():
    q, k, v = inputs(70)
    expected = (q.double() * k.double()).sum(-1, keepdim=True) * v.double()
    out = chunked(q, k, v, torch.full((2,), 1000.0), bounds([70]))
    assert relative_error(out, expected) < TOLERANCE


@slope_kinds
@pytest.mark.parametrize("length", ODD_LENGTHS)
def test_chunked_equals_recurrent_at_odd_lengths(length, slopes):
    q, k, v = inputs(length)
    slopes, cu_seqlens = torch.tensor(slopes), bounds([length])
    expected, _ = recurrent(q, k, v, slopes, cu_seqlens)
    assert relative_error(chunked(q, k, v, slopes, cu_seqlens), expected) < TOLERANCE


@slope_kinds
@pytest.mark.parametrize("lengths", PACKINGS, ids=str)
def test_chunked_equals_recurrent_on_packed_sequences(lengths, slopes):
    q, k, v = inputs(sum(lengths))
    slopes, cu_seqlens = torch.tensor(slopes), bounds(lengths)
    expected, _ = recurrent(q, k, v, slopes, cu_seqlens)
    assert relative_error(chunked(q, k, v, slopes, cu_seqlens), expected) < TOLERANCE


@settings(max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 70))
def test_the_chunk_size_does_not_matter(lengths, chunk):
    q, k, v = inputs(sum(lengths))
    slopes, cu_seqlens = torch.tensor([0.2, 0.01]), bounds(lengths)
    expected, _ = recurrent(q, k, v, slopes, cu_seqlens)
    out = chunked(q, k, v, slopes, cu_seqlens, chunk=chunk)
    assert relative_error(out, expected) < TOLERANCE


@pytest.mark.parametrize(("key_dim", "value_dim"), [(4, 12), (16, 3), (1, 5)])
def test_key_and_value_dims_may_differ(key_dim, value_dim):
    q, k, v = inputs(83, key_dim=key_dim, value_dim=value_dim)
    slopes, cu_seqlens = torch.tensor([0.5, 0.06]), bounds([50, 33])
    expected, expected_final = recurrent(q, k, v, slopes, cu_seqlens)
    out, final = lightning_attention(q, k, v, slopes, cu_seqlens, output_final_state=True)
    assert out.shape == (83, 2, value_dim) and final.shape == (2, 2, key_dim, value_dim)
    assert relative_error(out, expected) < TOLERANCE
    assert relative_error(final, expected_final) < TOLERANCE


@slope_kinds
@pytest.mark.parametrize("lengths", [[1], [63], [33, 1, 31, 70]], ids=str)
def test_gradients_equal_those_through_the_recurrence(lengths, slopes):
    tensors = inputs(sum(lengths), value_dim=6)
    slopes, cu_seqlens = torch.tensor(slopes), bounds(lengths)
    upstream = torch.randn(sum(lengths), 2, 6, generator=torch.Generator().manual_seed(1))

    exact = [x.double().requires_grad_() for x in tensors]
    (recurrent(*exact, slopes, cu_seqlens)[0] * upstream).sum().backward()
    fast = [x.clone().requires_grad_() for x in tensors]
    (chunked(*fast, slopes, cu_seqlens) * upstream).sum().backward()
    for a, b in zip(fast, exact, strict=True):
        assert relative_error(a.grad, b.grad) < TOLERANCE


@slope_kinds
@pytest.mark.parametrize("lengths", [[1000], *PACKINGS], ids=str)
def test_final_states_equal_the_recurrence(lengths, slopes):
    q, k, v = inputs(sum(lengths))
    slopes, cu_seqlens = torch.tensor(slopes), bounds(lengths)
    _, expected = recurrent(q, k, v, slopes, cu_seqlens)
    final = final_states(k, v, slopes, cu_seqlens)
    assert final.dtype == torch.float32
    assert relative_error(final, expected) < TOLERANCE


def test_final_states_come_only_on_request():
    q, k, v = inputs(5)
    assert lightning_attention(q, k, v, torch.ones(2), bounds([5]))[1] is None


def test_an_initial_state_continues_a_sequence_exactly():
    q, k, v = inputs(40)
    slopes = torch.tensor([0.5, 0.06])
    whole, whole_final = recurrent(q, k, v, slopes, bounds([40]))
    head, state = recurrent(q[:17], k[:17], v[:17], slopes, bounds([17]))
    tail, final = recurrent(q[17:], k[17:], v[17:], slopes, bounds([23]), state)
    assert torch.equal(torch.cat([head, tail]), whole)
    assert torch.equal(final, whole_final)


@slope_kinds
def test_steps_continue_prefixes_of_several_sequences(slopes):
    lengths, num_steps = [1, 40, 33], 6
    sequences = [inputs(length + num_steps, seed=n) for n, length in enumerate(lengths)]
    slopes = torch.tensor(slopes)
    prefix = [
        torch.cat([sequence[i][:n] for sequence, n in zip(sequences, lengths, strict=True)])
        for i in range(3)
    ]
    _, state = lightning_attention(*prefix, slopes, bounds(lengths), output_final_state=True)
    for t in range(num_steps):
        token = [
            torch.stack([s[i][n + t] for s, n in zip(sequences, lengths, strict=True)])
            for i in range(3)
        ]
        out = lightning_attention_step(*token, slopes, state)  # updates the state in place
        for row, (sequence, n) in enumerate(zip(sequences, lengths, strict=True)):
            expected, final = recurrent(
                *(x[: n + t + 1] for x in sequence), slopes, bounds([n + t + 1])
            )
            assert relative_error(out[row], expected[-1]) < TOLERANCE
            assert relative_error(state[row], final[0]) < TOLERANCE


def test_changing_a_sequence_leaves_the_others_bitwise_unchanged():
    lengths = [20, 45, 1, 60]
    tensors, slopes, cu_seqlens = inputs(126), torch.tensor([0.5, 1e-4]), bounds(lengths)
    changed = [x.clone() for x in tensors]
    for x in changed:
        x[20:65] = 1e3 * torch.randn(x[20:65].shape)
    before = lightning_attention(*tensors, slopes, cu_seqlens, output_final_state=True)
    after = lightning_attention(*changed, slopes, cu_seqlens, output_final_state=True)
    others = [*range(20), *range(65, 126)]
    assert torch.equal(before[0][others], after[0][others])
    assert torch.equal(before[1][[0, 2, 3]], after[1][[0, 2, 3]])
    assert not torch.equal(before[0][20:65], after[0][20:65])


def test_changing_a_token_leaves_earlier_outputs_bitwise_unchanged():
    tensors, slopes, cu_seqlens = inputs(100), torch.tensor([0.5, 1e-4]), bounds([100])
    changed = [x.clone() for x in tensors]
    for x in changed:
        x[70] += 1.0
    before, after = (chunked(*x, slopes, cu_seqlens) for x in (tensors, changed))
    assert torch.equal(before[:70], after[:70])
    assert not torch.equal(before[70:], after[70:])


def test_no_gradient_crosses_a_bound():
    tensors = [x.requires_grad_() for x in inputs(90)]
    out = chunked(*tensors, torch.tensor([0.5, 1e-4]), bounds([40, 50]))
    out[:40].square().sum().backward()
    for x in tensors:
        assert torch.count_nonzero(x.grad[40:]) == 0
        assert torch.count_nonzero(x.grad[:40]) == x.grad[:40].numel()


def test_bfloat16_inputs_are_summed_in_float32():
    q, k, v = (x.bfloat16() for x in inputs(200))
    slopes, cu_seqlens = torch.tensor([0.5, 1e-4]), bounds([200])
    expected, _ = recurrent(q, k, v, slopes, cu_seqlens)
    out = chunked(q, k, v, slopes, cu_seqlens)
    assert out.dtype == torch.bfloat16
    # One rounding of the output to 8 bits: at most 2^-9 of each value.
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-4)


def test_slopes_of_the_first_layer_are_powers_of_two():
    slopes = lightning_slopes(8, layer_index=0, num_layers=80)
    expected = torch.tensor([0.5**h for h in range(1, 9)]) * (1 + 1e-5)
    torch.testing.assert_close(slopes, expected, rtol=1e-7, atol=0)
    assert slopes.dtype == torch.float32


def test_slopes_of_the_last_layer_hardly_decay():
    slopes = lightning_slopes(2, layer_index=79, num_layers=80)
    torch.testing.assert_close(slopes, torch.tensor([1e-5 / 16, 1e-5 / 256]), rtol=1e-6, atol=0)


def test_slopes_in_the_middle_follow_the_formula():
    slopes = lightning_slopes(64, layer_index=20, num_layers=81)
    expected = torch.tensor([2 ** (-8 * h / 64) * (0.75 + 1e-5) for h in range(1, 65)])
    torch.testing.assert_close(slopes, expected, rtol=1e-6, atol=0)


def test_slopes_may_divide_by_a_little_more_than_the_last_layers_index():
    slopes = lightning_slopes(1, layer_index=1, num_layers=2, depth_epsilon=1e-5)
    expected = torch.tensor([2**-8 * (1 - 1 / (1 + 1e-5) + 1e-5)], dtype=torch.float64)
    torch.testing.assert_close(slopes.double(), expected, rtol=1e-6, atol=0)


def test_a_single_layer_counts_as_the_first():
    alone = lightning_slopes(4, layer_index=0, num_layers=1)
    assert torch.equal(alone, lightning_slopes(4, layer_index=0, num_layers=12))


def test_gradients_of_the_chunked_form_are_its_derivatives():
    """`gradcheck` in float64: outputs and final states in q, k, v and the initial state."""
    slopes, cu_seqlens = torch.tensor([0.5, 1e-4]), bounds([5, 1, 9])
    given = [x.double().requires_grad_() for x in inputs(15, key_dim=3, value_dim=2)]
    state = torch.randn(3, 2, 3, 2, generator=torch.Generator().manual_seed(1)).double()

    def work(q, k, v, initial):
        out = chunked(q, k, v, slopes, cu_seqlens, initial, chunk=4)
        return out, final_states(k, v, slopes, cu_seqlens, initial)

    assert torch.autograd.gradcheck(work, (*given, state.requires_grad_()))


def test_the_chunked_form_continues_from_an_initial_state():
    (q, k, v), slopes = inputs(70), torch.tensor([0.5, 0.06])
    cu_seqlens = bounds([33, 37])
    state = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    expected, expected_final = recurrent(q, k, v, slopes, cu_seqlens, state)
    out, final = lightning_attention(
        q, k, v, slopes, cu_seqlens, initial_state=state, output_final_state=True
    )
    assert relative_error(out, expected) < TOLERANCE
    assert relative_error(final, expected_final) < TOLERANCE


def test_a_sequence_alone_and_packed_agree_bitwise_when_batch_invariant():
    lengths, slopes = [3, 70, 5], lightning_slopes(2, layer_index=1, num_layers=8)
    q, k, v = inputs(sum(lengths))
    states = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))

    def run(rows, numbers, invariant):
        return lightning_attention(
            *(x[rows] for x in (q, k, v)),
            slopes,
            bounds(lengths[numbers]),
            initial_state=states[numbers],
            output_final_state=True,
            batch_invariant=invariant,
        )

    alone, packed = slice(3, 73), slice(None)
    out, final = run(packed, slice(None), True)
    alone_out, alone_final = run(alone, slice(1, 2), True)
    assert torch.equal(out[alone], alone_out) and torch.equal(final[1:2], alone_final)
    # Without the flag chunks begin elsewhere in the sequence: the sums differ.
    loose, _ = run(packed, slice(None), False)
    assert not torch.equal(loose[alone], run(alone, slice(1, 2), False)[0])
    torch.testing.assert_close(loose, out)
