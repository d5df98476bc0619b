from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m1.config.schema import ScheduleConfig
from m1.train.schedule import learning_rate


def rates(num_steps, **config):
    schedule = ScheduleConfig(**config)
    return [
        learning_rate(schedule, peak=1.0, step=step, num_steps=num_steps)
        for step in range(num_steps)
    ]


def test_the_default_is_constant():
    assert rates(5) == [1.0] * 5


def test_warm_up_is_linear_and_ends_at_the_peak():
    assert rates(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_decay_by_hand():
    decayed = rates(8, decay_fraction=0.5, min_lr=0.2, decay_style="linear")
    assert decayed == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_decay_by_hand():
    # Thirds of the way: (1 + cos(pi/3)) / 2 = 3/4, (1 + cos(2 pi/3)) / 2 = 1/4.
    assert rates(4, decay_fraction=0.75, min_lr=0.0) == pytest.approx([1.0, 0.75, 0.25, 0.0])


def test_warm_up_constant_and_decay_follow_each_other():
    every = rates(10, warmup_steps=2, decay_fraction=0.3, min_lr=0.1, decay_style="linear")
    assert every == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.7, 0.4, 0.1])


@given(
    st.integers(1, 500),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
    st.sampled_from(["linear", "cosine"]),
)
def test_a_decay_falls_without_rest_to_exactly_min_lr(num_steps, fraction, min_lr, style):
    every = rates(num_steps, decay_fraction=fraction, min_lr=min_lr, decay_style=style)
    assert all(a >= b for a, b in pairwise(every))
    if round(fraction * num_steps):
        assert every[-1] == pytest.approx(min_lr, abs=1e-15)


def test_the_peak_scales_the_rate():
    config = ScheduleConfig(warmup_steps=10)
    assert learning_rate(config, peak=3e-4, step=4, num_steps=20) == pytest.approx(1.5e-4)
