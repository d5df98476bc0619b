import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from m1.inference.params import SamplingParams
from m1.inference.sampler import RandomStream, RowParams, sample

PROBABILITIES = (0.1, 0.4, 0.05, 0.25, 0.2)
LOGITS = torch.tensor([PROBABILITIES]).log() + 3.0  # a constant changes nothing


def draw(uniform, *, logits=LOGITS, num_tokens=5, **sampling):
    uniform = torch.as_tensor(uniform)
    rows = logits.expand(len(uniform), -1)
    params = RowParams.of([SamplingParams(max_new_tokens=1, **sampling)] * len(uniform))
    return sample(rows, uniform, params, num_tokens=num_tokens)


def uniforms(seed, count):
    stream = RandomStream(seed)
    return np.array([stream.next() for _ in range(count)])


def grid(count=1000):
    """The middles of `count` equal parts of [0, 1)."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_greedy_takes_the_most_likely_token_whatever_the_random_number():
    assert draw([0.0, 0.5, 0.999], temperature=0).tokens.tolist() == [1, 1, 1]


def test_an_even_grid_of_random_numbers_hits_every_token_by_its_probability():
    counts = torch.bincount(draw(grid()).tokens, minlength=5)
    assert counts.tolist() == [100, 400, 50, 250, 200]


def test_temperature_raises_probabilities_to_its_inverse():
    counts = torch.bincount(draw(grid(10_000), temperature=0.5).tokens, minlength=5)
    squared = np.square(PROBABILITIES)
    np.testing.assert_allclose(counts / 10_000, squared / squared.sum(), atol=1e-4)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.3, {1}),
        (0.39, {1}),
        (0.41, {1, 3}),
        (0.64, {1, 3}),
        (0.8, {1, 3, 4}),
        (0.94, {0, 1, 3, 4}),
        (1.0, {0, 1, 2, 3, 4}),
    ],
)
def test_top_p_keeps_the_smallest_set_and_renormalises_it(top_p, kept):
    counts = torch.bincount(draw(grid(20_000), top_p=top_p).tokens, minlength=5)
    total = sum(PROBABILITIES[token] for token in kept)
    expected = [PROBABILITIES[t] / total if t in kept else 0.0 for t in range(5)]
    np.testing.assert_allclose(counts / 20_000, expected, atol=1e-4)


def test_top_p_smaller_than_any_token_is_greedy():
    assert draw(grid(50), top_p=1e-6).tokens.unique().tolist() == [1]


@pytest.mark.parametrize("seed", range(3))
def test_sampled_tokens_follow_the_distribution(seed):
    tokens = draw(uniforms(seed, 20_000)).tokens
    counts = torch.bincount(tokens, minlength=5).numpy()
    assert stats.chisquare(counts, 20_000 * np.array(PROBABILITIES)).pvalue > 0.001


@given(
    st.lists(st.floats(-50, 50), min_size=4, max_size=4),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    st.sampled_from([0.1, 0.95, 1.0]),
)
def test_padded_ids_are_never_chosen(logits, uniform, num_tokens, temperature, top_p):
    result = draw(
        [uniform],
        logits=torch.tensor([logits]),
        num_tokens=num_tokens,
        temperature=temperature,
        top_p=top_p,
    )
    assert 0 <= int(result.tokens[0]) < num_tokens


def test_a_token_of_probability_zero_is_never_chosen():
    logits = torch.tensor([[-math.inf, 0.0, -1e9, 0.0, -math.inf]])
    edges = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(edges, logits=logits).tokens.tolist() == [1, 3, 3]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.2}, {"top_p": 0.5}], ids=str)
def test_logprobs_and_entropy_are_those_before_temperature_and_top_p(sampling):
    result = draw(grid(100), **sampling)
    expected = torch.tensor(PROBABILITIES).log()[result.tokens]
    torch.testing.assert_close(result.logprobs, expected, rtol=0, atol=1e-6)
    entropy = -sum(p * math.log(p) for p in PROBABILITIES)
    torch.testing.assert_close(result.entropies, torch.full((100,), entropy), rtol=0, atol=1e-6)


def test_logprobs_count_the_padding_as_training_does():
    logits = torch.zeros(1, 4)
    result = draw([0.7], logits=logits, num_tokens=2)
    assert float(result.logprobs) == pytest.approx(math.log(1 / 4))
    assert int(result.tokens) == 1


def test_rows_are_sampled_independently():
    logits = torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
    uniform = torch.from_numpy(uniforms(0, 7))
    rows = [
        SamplingParams(max_new_tokens=1, **row)
        for row in (
            {"top_p": 0.9},
            {"temperature": 0},
            {"temperature": 3.0},
            {"top_k": 2},
            {"min_p": 0.5},
            {"top_p": 0.5, "top_k": 3, "temperature": 0.3},
            {},
        )
    ]
    together = sample(logits, uniform, RowParams.of(rows), num_tokens=20)
    for i, row in enumerate(rows):
        one = slice(i, i + 1)
        alone = sample(logits[one], uniform[one], RowParams.of([row]), num_tokens=20)
        assert together.tokens[i] == alone.tokens[0]
        torch.testing.assert_close(together.sampling_logprobs[one], alone.sampling_logprobs)


def test_random_numbers_are_a_function_of_the_seed():
    long = uniforms(2**64 - 1, 300)
    np.testing.assert_array_equal(uniforms(2**64 - 1, 10), long[:10])
    assert len(set(long)) == 300
    assert not np.array_equal(uniforms(0, 10), uniforms(1, 10))
    assert long.min() >= 0 and long.max() < 1


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 9}, {0, 1, 2, 3, 4}),
        ({"min_p": 0.6}, {1, 3}),
        ({"min_p": 0.2}, {0, 1, 3, 4}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 4, "top_p": 0.6}, {1, 3}),
        ({"top_k": 2, "min_p": 0.2}, {1, 3}),
    ],
    ids=str,
)
def test_filters_keep_their_intersection_and_renormalise_it(sampling, kept):
    counts = torch.bincount(draw(grid(20_000), **sampling).tokens, minlength=5)
    total = sum(PROBABILITIES[token] for token in kept)
    expected = [PROBABILITIES[t] / total if t in kept else 0.0 for t in range(5)]
    np.testing.assert_allclose(counts / 20_000, expected, atol=1e-4)


def test_sampling_logprobs_are_those_of_the_distribution_that_was_drawn_from():
    result = draw(grid(50), temperature=0.5, top_k=3)
    squared = np.square(PROBABILITIES)
    total = squared[[1, 3, 4]].sum()
    expected = torch.tensor(squared / total).log().float()[result.tokens]
    torch.testing.assert_close(result.sampling_logprobs, expected, rtol=0, atol=1e-6)
    assert draw([0.3], temperature=0).sampling_logprobs.tolist() == [0.0]


def test_top_logprobs_are_the_most_likely_tokens_before_temperature():
    result = draw([0.9], temperature=7.0, top_logprobs=3)
    assert result.top_tokens.tolist() == [[1, 3, 4]]
    expected = torch.tensor([[0.4, 0.25, 0.2]]).log()
    torch.testing.assert_close(result.top_logprobs, expected, rtol=0, atol=1e-6)
