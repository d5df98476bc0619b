"""The engine under pressure: what it computes does not depend on who shares it."""

import random

import pytest
import torch
from engine_checks import assert_nothing_leaks, finish, results
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.inference.params import SamplingParams
from m1.types import M1Error

STOP = 7


def params(**changes):
    return SamplingParams(**({"max_new_tokens": 12, "stop_tokens": (STOP,)} | changes))


def prompt(length, seed=0):
    return tuple(random.Random(seed).choices(range(60), k=length))


def run(core, requests):
    """Add (prompt, params, seeds) one after the other, run to the end, and return sequences."""
    groups = [core.add(p, s, seeds) for p, s, seeds in requests]
    finish(core)
    return [sequence for group in groups for sequence in group]


MIXED = [(prompt(3 + 7 * i, i), params(max_new_tokens=5 + 6 * i), (i, i + 50)) for i in range(6)]


@pytest.fixture(scope="module")
def expected(small_model, make_core):
    return results(run(make_core(small_model, num_slots=32), MIXED))


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("num_pages", [20, 27, 40])
def test_preempted_sequences_end_as_if_they_had_been_alone(
    small_model, make_core, expected, preemption, num_pages
):
    core = make_core(small_model, num_pages=num_pages, preemption=preemption)
    assert results(run(core, MIXED)) == expected
    assert core.scheduler.num_preemptions > 0 or num_pages == 40
    assert_nothing_leaks(core)


@pytest.mark.parametrize("step_tokens", [1, 3, 8, 50])
def test_prompts_cut_into_chunks_give_the_same_completions(
    small_model, make_core, expected, step_tokens
):
    core = make_core(small_model, step_tokens=step_tokens)
    assert results(run(core, MIXED)) == expected


def test_chunks_of_a_prompt_share_steps_with_sequences_that_decode(small_model, make_core):
    core = make_core(small_model, step_tokens=6)
    core.add(prompt(4), params(stop_tokens=()), (1,))
    core.step()
    core.add(prompt(40, 1), params(), (2,))
    finish(core)
    # 12 tokens of the first; 40 of the second's prompt at 5 a step overlap with them
    assert core.num_steps < 12 + 40 / 5 + 12


@pytest.mark.parametrize("num_slots", [1, 2, 5])
def test_a_group_larger_than_the_slots_is_completed_all_the_same(small_model, make_core, num_slots):
    request = [(prompt(9), params(), tuple(range(7)))]
    wanted = results(run(make_core(small_model, num_slots=16), request))
    core = make_core(small_model, num_slots=num_slots)
    assert results(run(core, request)) == wanted
    assert_nothing_leaks(core)


def test_a_group_that_leaves_no_page_for_a_second_child_is_completed_all_the_same(
    small_model, make_core
):
    request = [(prompt(13), params(max_new_tokens=3, stop_tokens=()), (1, 2, 3))]
    core = make_core(small_model, num_pages=4)
    wanted = results(run(make_core(small_model), request))
    assert results(run(core, request)) == wanted
    assert_nothing_leaks(core)


def test_who_came_first_begins_first(small_model, make_core):
    core = make_core(small_model, num_slots=3)
    begun = []
    for number, count in enumerate((1, 4, 1, 5, 1, 1)):

        def note(output, number=number):
            if (number, output.index) not in begun:
                begun.append((number, output.index))

        core.add(prompt(5, number), params(max_new_tokens=4), tuple(range(count)), on_token=note)
    finish(core)
    assert begun == sorted(begun) and len(begun) == 13


def test_the_prompt_of_a_group_is_computed_once(small_model, make_core):
    core = make_core(small_model, num_slots=16)
    run(core, [(prompt(30), params(), tuple(range(16)))])
    assert core.num_prefilled == 30


def test_a_turn_that_goes_on_computes_only_what_is_new(small_model, make_core):
    core = make_core(small_model, prefix_bytes=1 << 20)
    (first,) = run(core, [(prompt(30), params(stop_tokens=()), (1,))])
    before = core.num_prefilled
    reply = (*first.prompt, *first.tokens, *prompt(5, 9))
    (second,) = run(core, [(reply, params(), (2,))])
    # the last token of the first turn was never fed to the model
    assert core.num_prefilled - before == 1 + 5
    plain = make_core(small_model)
    (expected,) = run(plain, [(reply, params(), (2,))])
    assert results([second]) == results([expected])
    assert torch.tensor(second.logprobs).sub(torch.tensor(expected.logprobs)).abs().max() < 1e-5
    assert_nothing_leaks(core)


def test_the_same_prompt_again_goes_on_from_the_turn_before_it(small_model, make_core):
    core = make_core(small_model, prefix_bytes=1 << 20)
    long = prompt(33)
    run(core, [(long[:20], params(), (1,))])
    before = core.num_prefilled
    run(core, [(long, params(), (2,)), (long, params(), (3,))])
    assert core.num_prefilled - before == 13 * 2


def test_new_weights_forget_the_turns_of_the_old(small_model, make_core):
    core = make_core(small_model, prefix_bytes=1 << 20)
    run(core, [(prompt(20), params(), (1,))])
    core.weights_changed(version=1, recompute=False)
    before = core.num_prefilled
    run(core, [((*prompt(20), 3), params(), (1,))])
    assert core.num_prefilled - before == 21


def test_cancelled_sequences_leave_the_others_as_they_were(small_model, make_core, expected):
    core = make_core(small_model)
    groups = [core.add(*request) for request in MIXED]
    flat = [sequence for group in groups for sequence in group]
    for sequence in flat[::3]:
        core.cancel(sequence)
        core.step()
    finish(core)
    for number, (sequence, wanted) in enumerate(zip(flat, expected, strict=True)):
        if sequence.finish_reason == "cancelled":
            assert number % 3 == 0
            assert tuple(sequence.tokens) == wanted[0][: len(sequence.tokens)]
        else:
            assert results([sequence]) == [wanted]
    assert sum(sequence.finish_reason == "cancelled" for sequence in flat) >= 3
    assert_nothing_leaks(core)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**32),
    preemption=st.sampled_from(["swap", "recompute"]),
    prefix_bytes=st.sampled_from([0, 4000]),
    num_slots=st.integers(1, 12),
    num_pages=st.integers(14, 60),
    step_tokens=st.integers(1, 60),
)
def test_500_random_requests_leak_no_slot_and_no_page(
    small_model, make_core, seed, preemption, prefix_bytes, num_slots, num_pages, step_tokens
):
    """20 examples of 500 requests, with cancellations, stops, groups and updates of weights."""
    core = make_core(
        small_model,
        num_slots=num_slots,
        num_pages=num_pages,
        step_tokens=step_tokens,
        preemption=preemption,
        prefix_bytes=prefix_bytes,
    )
    chance = random.Random(seed)
    alive, total = [], 0
    while total < 500:
        for _ in range(chance.randint(1, 40)):
            sampling = params(max_new_tokens=chance.choice((1, 2, 4, 8, 24)))
            count = chance.choice((1, 1, 1, 2, 5))
            tokens = prompt(chance.choice((1, 3, 9, 30)), chance.randint(0, 5))
            alive += core.add(tokens, sampling, tuple(range(total, total + count)))
            total += 1
        for _ in range(chance.randint(1, 10)):
            core.step()
            if chance.random() < 0.1:
                core.weights_changed(version=total, recompute=chance.random() < 0.5)
        for sequence in chance.sample(alive, min(len(alive), chance.randint(0, 20))):
            core.cancel(sequence)
        if chance.random() < 0.7:  # let most end, so that an example takes a second
            for sequence in alive[:-30]:
                core.cancel(sequence)
        alive = [s for s in alive if s.finish_reason is None]
    finish(core)
    assert_nothing_leaks(core)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tokens": ()}, "no tokens"),
        ({"tokens": (3, 64)}, "token 64"),
        ({"tokens": (-1,)}, "token -1"),
        ({"tokens": prompt(250)}, "exceed model.max_position 256"),
        ({"seeds": ()}, "0 completions"),
        ({"num_pages": 3}, "memory for 12 tokens"),
        ({"stop_strings": ("x",)}, "no tokenizer"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(small_model, make_core, changes, text):
    core = make_core(small_model, num_pages=changes.pop("num_pages", 200))
    tokens, seeds = changes.pop("tokens", prompt(3)), changes.pop("seeds", (1,))
    with pytest.raises(M1Error, match=text):
        core.add(tokens, params(**changes), seeds)
    finish(core)
    assert_nothing_leaks(core)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.5},
        {"top_logprobs": 21},
        {"stop_strings": ("",)},
    ],
    ids=str,
)
def test_parameters_that_cannot_be_are_refused_by_name(changes):
    with pytest.raises(M1Error, match=next(iter(changes))):
        params(**changes)
