import math
from dataclasses import replace

import pytest

from m1.config.schema import DynamicSamplingConfig
from m1.rollout.filtering import (
    fault_of,
    faults,
    is_informative,
    is_kept,
    sample_informative,
    screen,
)
from m1.types import RolloutGroup
from tests.unit.rollout.making import group, names, rollout, stream, task

VOCAB = 64


def run(sample, tasks, *, wanted=2, **dynamic):
    config = DynamicSamplingConfig(**dynamic)
    return sample_informative(sample, tasks.take, config, wanted=wanted, seed=1)


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


def sampler(accuracies_of_call):
    """Sample the n-th batch with the n-th rows of accuracies, noting the tasks asked for."""
    asked = []

    def sample(tasks, seed):
        asked.append(names(tasks))
        rows = accuracies_of_call[len(asked) - 1]
        return [group(*row, name=t.task_id) for row, t in zip(rows, tasks, strict=True)]

    return sample, asked


def test_only_informative_groups_are_kept_and_all_are_counted():
    sample, asked = sampler([[(0, 1), (1, 1)], [(0, 0), (1, 0)]])
    tasks = stream(20)
    sampled = run(sample, tasks)
    assert [g.task.task_id for g in sampled.kept] == [asked[0][0], asked[1][1]]
    assert [g.task.task_id for g in sampled.all] == asked[0] + asked[1]
    assert tasks.cursor == 4


def test_a_full_first_batch_draws_no_other():
    sample, asked = sampler([[(0, 1), (1, 0)]])
    sampled = run(sample, stream(20))
    assert len(asked) == 1 and len(sampled.kept) == 2


def test_surplus_groups_are_dropped():
    sample, _ = sampler([[(0, 1), (0, 0)], [(0, 1), (1, 0)]])
    sampled = run(sample, stream(20))
    assert len(sampled.kept) == 2 and len(sampled.all) == 4


def test_extra_batches_are_bounded_and_the_step_goes_on_with_what_it_has():
    sample, asked = sampler([[(0, 0), (1, 1)], [(0, 0), (1, 0)], [(0, 0), (0, 0)]])
    sampled = run(sample, stream(20), max_extra_batches=2)
    assert len(asked) == 3 and len(sampled.kept) == 1 and len(sampled.all) == 6


def test_without_any_informative_group_the_batch_says_why():
    sample, asked = sampler([[(0, 0), (1, 1)], [(0, 0), (0, 0)]])
    sampled = run(sample, stream(20), max_extra_batches=1)
    assert not sampled.kept and len(sampled.all) == 4 and len(asked) == 2
    assert "none of 4 sampled groups" in sampled.reason and "accuracy 0.250" in sampled.reason


def test_without_dynamic_sampling_every_group_is_kept():
    sample, asked = sampler([[(0, 0), (1, 1)]])
    sampled = run(sample, stream(20), enabled=False)
    assert len(asked) == 1 and len(sampled.kept) == 2


def test_the_shaped_reward_does_not_make_a_group_informative():
    shaped = RolloutGroup(task("t"), (rollout(0.0, total=0.1), rollout(0.0, total=0.0)))

    def sample(tasks, seed):
        return [shaped for _ in tasks]

    assert not run(sample, stream(5), max_extra_batches=0).kept


def test_without_dynamic_sampling_a_group_still_needs_two_scored_completions():
    off = DynamicSamplingConfig(enabled=False)
    lonely = RolloutGroup(task("t"), (rollout(1.0), rollout(0.0, failed=True)))
    assert not is_kept(lonely, off) and is_kept(group(1, 1), off)
    assert not is_kept(RolloutGroup(task("t"), ()), off)


def with_completion(**changes):
    sound = rollout(1.0)
    return replace(sound, completion=replace(sound.completion, **changes))


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (rollout(math.nan), "reward_not_finite"),
        (rollout(1.0, total=math.inf), "reward_not_finite"),
        (with_completion(logprobs=(-0.1, math.nan)), "impossible_logprobs"),
        (with_completion(logprobs=(-math.inf, -0.1)), "impossible_logprobs"),
        (with_completion(logprobs=(-0.1, 0.5)), "impossible_logprobs"),
        (with_completion(logprobs=(-0.1,)), "lengths_differ"),
        (with_completion(policy_versions=(0, 0, 0)), "lengths_differ"),
        (with_completion(tokens=(1, VOCAB)), "unknown_tokens"),
        (rollout(1.0, tokens=()), "no_tokens"),
    ],
)
def test_an_impossible_rollout_is_named_and_left_out_as_failed(bad, fault):
    assert fault_of(bad, num_tokens=VOCAB) == fault
    (screened,) = screen([RolloutGroup(task("t"), (bad, rollout(0.0)))], num_tokens=VOCAB)
    assert [r.reward.is_failed for r in screened.rollouts] == [True, False]
    assert screened.rollouts[0].reward.total == 0.0
    assert faults([screened]) == {fault: 1}


def test_a_sound_rollout_is_left_as_it_is():
    sound = RolloutGroup(task("t"), (with_completion(entropies=(math.nan,) * 2), rollout(0.0)))
    assert screen([sound], num_tokens=VOCAB) == [sound]
    assert faults([sound]) == {}


def test_an_empty_group_is_counted_and_dropped():
    empty = RolloutGroup(task("t"), ())

    def sample(tasks, seed):
        return [empty, *(group(0, 1) for _ in tasks[1:])]

    sampled = run(sample, stream(5), enabled=False)
    assert len(sampled.kept) == 1 and faults(sampled.all) == {"empty_group": 1}


def test_a_batch_whose_rollouts_all_failed_names_the_causes():
    broken = RolloutGroup(task("t"), (rollout(math.nan), rollout(0.0, failed=True)))

    def sample(tasks, seed):
        return screen([broken for _ in tasks], num_tokens=VOCAB)

    sampled = run(sample, stream(9), max_extra_batches=0)
    assert not sampled.kept
    assert "4 of 4 completions failed (format 2, reward_not_finite 2)" in sampled.reason
