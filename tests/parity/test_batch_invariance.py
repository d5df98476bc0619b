"""Batch-invariant mode: bits of a request do not depend on what else the engine computes."""

import random

import pytest

from m1.inference.core import EngineCore
from m1.inference.limits import EngineLimits
from m1.inference.params import SamplingParams


def request(number):
    """Prompt, parameters and seed of one request; lengths and temperatures differ."""
    chance = random.Random(number)
    prompt = tuple(chance.choices(range(60), k=chance.choice((2, 17, 33, 60, 90))))
    params = SamplingParams(
        max_new_tokens=chance.choice((5, 20, 40)), temperature=chance.choice((0, 0.7, 1.0))
    )
    return prompt, params, (number,)


def run(model, numbers, **limits):
    """Bits of every request, which arrive a few at a time."""
    sizes = {"num_slots": 64, "num_pages": 600, "step_tokens": 64, "is_invariant": True} | limits
    core = EngineCore(model, num_tokens=60, limits=EngineLimits(**sizes))
    found = {}
    for number in numbers:
        (found[number],) = core.add(*request(number))
        if number % 3 == 0:
            core.step()
    while not core.is_idle:
        core.step()
    preemptions = core.scheduler.num_preemptions
    return {n: (s.tokens, s.logprobs, s.entropies) for n, s in found.items()}, preemptions


@pytest.fixture(scope="module")
def together(tiny_model):
    return run(tiny_model, range(64))[0]


@pytest.mark.parametrize("number", [0, 7, 21, 42, 63])
def test_a_request_has_the_same_bits_alone_and_among_63_others(tiny_model, together, number):
    assert run(tiny_model, [number])[0][number] == together[number]


def test_order_and_preemption_change_no_bit(tiny_model, together):
    found, preemptions = run(tiny_model, reversed(range(64)), num_pages=60, num_slots=20)
    assert preemptions > 0
    assert found == together


def test_without_the_mode_bits_do_depend_on_the_batch(tiny_model):
    """Else the tests above would show nothing."""
    whole, _ = run(tiny_model, range(64), is_invariant=False)
    alone = {n: run(tiny_model, [n], is_invariant=False)[0][n] for n in range(0, 64, 8)}
    assert any(alone[n] != whole[n] for n in alone)
