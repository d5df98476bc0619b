import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from m1.train.advantage import group_advantages, is_informative

reward_lists = st.lists(st.floats(-10, 10), min_size=2, max_size=12)


def test_one_right_of_four_by_hand():
    # mean 1/4, population variance 3/16.
    std = math.sqrt(3) / 4
    expected = [0.75 / std, -0.25 / std, -0.25 / std, -0.25 / std]
    assert group_advantages([1.0, 0.0, 0.0, 0.0]) == pytest.approx(expected)


def test_half_right_gives_plus_and_minus_one():
    assert group_advantages([1.1, 0.1]) == pytest.approx([1.0, -1.0])


@pytest.mark.parametrize("rewards", [[0.3, 0.3, 0.3], [0.0, 1e-9], [1.0], []])
def test_a_group_without_spread_gets_zeros(rewards):
    assert group_advantages(rewards) == [0.0] * len(rewards)


def test_failed_rollouts_are_left_out_and_get_zero():
    rewards, failed = [0.0, 1.0, 0.0, 5.0], [True, False, False, True]
    assert group_advantages(rewards, failed) == pytest.approx([0.0, 1.0, -1.0, 0.0])


def test_one_usable_rollout_gets_zero():
    assert group_advantages([1.0, 0.0], [False, True]) == [0.0, 0.0]


def test_an_infinite_reward_is_refused_unless_its_rollout_failed():
    with pytest.raises(ValueError, match="finite"):
        group_advantages([1.0, math.nan])
    assert group_advantages([1.0, 0.0, math.nan], [False, False, True]) == [1.0, -1.0, 0.0]


@given(reward_lists)
def test_advantages_have_mean_zero_and_variance_one(rewards):
    assume(np.std(rewards) > 1e-3)
    advantages = group_advantages(rewards)
    assert np.mean(advantages) == pytest.approx(0.0, abs=1e-6)
    assert np.std(advantages) == pytest.approx(1.0)


@given(reward_lists, st.floats(0.5, 4), st.floats(-5, 5))
def test_scale_and_shift_of_the_reward_do_not_matter(rewards, scale, shift):
    assume(np.std(rewards) > 1e-2)
    changed = group_advantages([scale * reward + shift for reward in rewards])
    assert changed == pytest.approx(group_advantages(rewards), abs=1e-6)


@pytest.mark.parametrize(
    ("accuracies", "failed", "expected"),
    [
        ([0.0, 1.0], (), True),
        ([0.0, 0.0], (), False),
        ([1.0, 1.0], (), False),
        ([1.0, 0.0, 1.0], (False, True, False), False),
        ([1.0, 0.0], (False, True), False),
        ([], (), False),
    ],
)
def test_a_group_is_informative_between_all_wrong_and_all_right(accuracies, failed, expected):
    assert is_informative(accuracies, failed) is expected
