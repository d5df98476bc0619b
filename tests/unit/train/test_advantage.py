import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from m1.train.advantage import batch_advantages, group_advantages

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


GROUPS = [([1.0, 0.0, 0.0], [False] * 3), ([3.0, 0.0, 9.0], [False, False, True])]


def test_batch_std_divides_by_the_spread_of_all_that_did_not_fail():
    # R - mean R: 2/3, -1/3, -1/3; 1.5, -1.5.
    std = np.std([2 / 3, -1 / 3, -1 / 3, 1.5, -1.5])
    first, second = batch_advantages(GROUPS, scale="batch_std")
    assert first == pytest.approx([2 / 3 / std, -1 / 3 / std, -1 / 3 / std])
    assert second == pytest.approx([1.5 / std, -1.5 / std, 0.0])


def test_without_a_scale_advantages_are_differences_from_the_mean():
    assert batch_advantages(GROUPS, scale="none")[1] == pytest.approx([1.5, -1.5, 0.0])


def test_the_papers_scale_is_each_groups_own():
    expected = [group_advantages(*g) for g in GROUPS]
    assert batch_advantages(GROUPS, scale="group_std") == expected
    zeros = [([1.0, 1.0], [False] * 2)]
    assert batch_advantages(zeros, scale="batch_std") == [[0.0, 0.0]]
