import pytest
from hypothesis import given
from hypothesis import strategies as st

from m1.rewards.length import overlong_penalty


@pytest.mark.parametrize(
    ("num_tokens", "penalty"), [(0, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (500, -1)]
)
def test_the_penalty_is_linear_between_its_ends(num_tokens, penalty):
    assert overlong_penalty(num_tokens, max_tokens=100, cache_tokens=20) == penalty


@given(st.integers(0, 300), st.integers(0, 300))
def test_longer_is_never_better(a, b):
    shorter, longer = sorted((a, b))
    penalties = [overlong_penalty(n, max_tokens=200, cache_tokens=50) for n in (shorter, longer)]
    assert penalties[0] >= penalties[1]


def test_a_cache_longer_than_the_maximum_is_refused():
    with pytest.raises(ValueError, match="must lie in 1 to max_tokens"):
        overlong_penalty(1, max_tokens=10, cache_tokens=11)
