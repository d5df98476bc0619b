from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m1.evaluate.statistics import mean_with_interval, pass_at_k


def estimate(values, **changes):
    settings = {"confidence": 0.95, "num_bootstrap": 2000, "seed": 0, **changes}
    return mean_with_interval(values, **settings)


def test_the_interval_is_near_the_normal_one_for_many_values():
    values = np.random.default_rng(0).random(400)
    result = estimate(values)
    half = 1.96 * values.std() / 20
    assert result.mean == pytest.approx(values.mean())
    # Measured: 0.0009 off, of a half width of 0.029.
    assert result.low == pytest.approx(result.mean - half, abs=0.003)
    assert result.high == pytest.approx(result.mean + half, abs=0.003)


def test_about_95_of_100_intervals_hold_the_true_mean():
    generator = np.random.default_rng(0)
    held = 0
    for trial in range(100):
        result = estimate(generator.random(50), num_bootstrap=200, seed=trial)
        held += result.low <= 0.5 <= result.high
    assert 88 <= held <= 100  # measured: 91; binomial(100, 0.95) is below 88 once in 700


def test_more_confidence_widens_the_interval():
    values = [0.0, 0.25, 0.5, 1.0, 1.0, 0.75]
    narrow, wide = estimate(values, confidence=0.8), estimate(values, confidence=0.99)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_the_seed_decides_the_interval():
    values = np.random.default_rng(1).random(30)
    assert estimate(values) == estimate(values)
    assert estimate(values) != estimate(values, seed=1)


@pytest.mark.parametrize("count", [1, 2, 30])
def test_all_wrong_gets_the_exact_interval(count):
    # Clopper-Pearson at 0 of n: upper bound 1 - (alpha / 2)^(1/n).
    result = estimate([0.0] * count)
    assert (result.mean, result.low) == (0.0, 0.0)
    assert result.high == pytest.approx(1 - 0.025 ** (1 / count))


@pytest.mark.parametrize("count", [1, 2, 30])
def test_all_right_gets_the_exact_interval(count):
    result = estimate([1.0] * count)
    assert (result.mean, result.high) == (1.0, 1.0)
    assert result.low == pytest.approx(0.025 ** (1 / count))


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=12))
def test_the_interval_holds_the_mean_and_stays_in_the_unit_interval(values):
    result = estimate(values, num_bootstrap=100)
    assert 0.0 <= result.low <= result.mean <= result.high <= 1.0


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_pass_at_1_is_the_share_of_right_samples():
    assert pass_at_k(8, 3, 1) == pytest.approx(3 / 8)


def test_pass_at_n_is_whether_any_sample_is_right():
    assert (pass_at_k(5, 0, 5), pass_at_k(5, 1, 5)) == (0.0, 1.0)


@given(st.integers(1, 8), st.data())
def test_pass_at_k_equals_the_share_of_all_subsets(num_samples, data):
    num_correct = data.draw(st.integers(0, num_samples))
    k = data.draw(st.integers(1, num_samples))
    subsets = list(combinations([True] * num_correct + [False] * (num_samples - num_correct), k))
    expected = sum(any(subset) for subset in subsets) / len(subsets)
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected)


@pytest.mark.parametrize("arguments", [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_impossible_counts_are_refused(arguments):
    with pytest.raises(ValueError, match="correct"):
        pass_at_k(*arguments)
