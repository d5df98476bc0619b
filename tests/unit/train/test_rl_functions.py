import math

import numpy as np
import pytest
import torch

from m1.config.schema import DynamicSamplingConfig, OptimizerConfig, RlConfig
from m1.train.batches import TrainSample
from m1.train.rl import (
    SampledBatch,
    TaskStream,
    mismatch_metrics,
    rollout_metrics,
    sample_informative,
    train_samples,
)
from m1.types import Completion, M1Error, Reward, Rollout, RolloutGroup, Task


def task(name):
    return Task(task_id=str(name), source="s", prompt="p", reference="r", verifier="v")


def rollout(
    accuracy, *, total=None, failed=False, prompt=(5, 6, 7), tokens=(8, 9), reason="stop", name="t"
):
    completion = Completion(
        prompt_tokens=prompt,
        tokens=tokens,
        logprobs=tuple(-0.1 * (i + 1) for i in range(len(tokens))),
        entropies=tuple(float(i) for i in range(len(tokens))),
        finish_reason=reason,
        policy_versions=(0,) * len(tokens),
    )
    reward = Reward(accuracy if total is None else total, accuracy, {"format": 1.0}, failed)
    return Rollout(task(name), completion, reward)


def group(*accuracies, name="t"):
    return RolloutGroup(task(name), tuple(rollout(a, name=name) for a in accuracies))


def config(*, prompts=2, **dynamic):
    return RlConfig(
        num_steps=1,
        prompts_per_step=prompts,
        group_size=2,
        updates_per_step=1,
        optimizer=OptimizerConfig(lr=1e-3),
        dynamic_sampling=DynamicSamplingConfig(**dynamic),
    )


def stream(count, seed=0):
    return TaskStream([task(number) for number in range(count)], seed=seed)


def names(tasks):
    return [each.task_id for each in tasks]


def test_a_task_stream_takes_every_task_once_an_epoch():
    tasks = stream(5)
    taken = [name for _ in range(5) for name in names(tasks.take(3))]
    for epoch in range(3):
        assert sorted(taken[5 * epoch : 5 * epoch + 5]) == ["0", "1", "2", "3", "4"]
    assert tasks.cursor == 15


def test_a_task_stream_resumes_from_its_cursor():
    tasks = stream(7)
    tasks.take(9)
    resumed = stream(7)
    resumed.cursor = tasks.cursor
    assert names(resumed.take(11)) == names(tasks.take(11))


def test_a_task_stream_without_tasks_is_refused():
    with pytest.raises(M1Error, match="num_rl"):
        stream(0)


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
    sampled = sample_informative(sample, tasks, config(), seed=1)
    assert [g.task.task_id for g in sampled.kept] == [asked[0][0], asked[1][1]]
    assert [g.task.task_id for g in sampled.all] == asked[0] + asked[1]
    assert tasks.cursor == 4


def test_a_full_first_batch_draws_no_other():
    sample, asked = sampler([[(0, 1), (1, 0)]])
    sampled = sample_informative(sample, stream(20), config(), seed=1)
    assert len(asked) == 1 and len(sampled.kept) == 2


def test_surplus_groups_are_dropped():
    sample, _ = sampler([[(0, 1), (0, 0)], [(0, 1), (1, 0)]])
    sampled = sample_informative(sample, stream(20), config(), seed=1)
    assert len(sampled.kept) == 2 and len(sampled.all) == 4


def test_extra_batches_are_bounded_and_the_step_goes_on_with_what_it_has():
    sample, asked = sampler([[(0, 0), (1, 1)], [(0, 0), (1, 0)], [(0, 0), (0, 0)]])
    sampled = sample_informative(sample, stream(20), config(max_extra_batches=2), seed=1)
    assert len(asked) == 3 and len(sampled.kept) == 1 and len(sampled.all) == 6


def test_no_informative_group_at_all_is_an_error_with_the_accuracy():
    sample, asked = sampler([[(0, 0), (1, 1)], [(0, 0), (0, 0)]])
    with pytest.raises(M1Error, match=r"none of 4 sampled groups .*accuracy 0\.250"):
        sample_informative(sample, stream(20), config(max_extra_batches=1), seed=1)
    assert len(asked) == 2


def test_without_dynamic_sampling_every_group_is_kept():
    sample, asked = sampler([[(0, 0), (1, 1)]])
    sampled = sample_informative(sample, stream(20), config(enabled=False), seed=1)
    assert len(asked) == 1 and len(sampled.kept) == 2


def test_the_shaped_reward_does_not_make_a_group_informative():
    shaped = RolloutGroup(task("t"), (rollout(0.0, total=0.1), rollout(0.0, total=0.0)))

    def sample(tasks, seed):
        return [shaped for _ in tasks]

    with pytest.raises(M1Error, match="none of 2"):
        sample_informative(sample, stream(5), config(max_extra_batches=0), seed=1)


def test_samples_shift_targets_and_mask_exactly_the_completion():
    group = RolloutGroup(
        task("t"),
        (rollout(1.0), rollout(0.0, prompt=(3,), tokens=(4,))),
    )
    long, short = train_samples([group])
    assert long.tokens.tolist() == [5, 6, 7, 8]
    assert long.targets.tolist() == [6, 7, 8, 9]
    assert long.loss_mask.tolist() == [False, False, True, True]
    torch.testing.assert_close(long.behaviour_logprobs, torch.tensor([0.0, 0.0, -0.1, -0.2]))
    assert (short.tokens.tolist(), short.targets.tolist()) == ([3], [4])
    assert short.loss_mask.tolist() == [True]
    assert (long.advantage, short.advantage) == (1.0, -1.0)


def test_advantages_follow_the_total_reward_within_each_group():
    first = RolloutGroup(task("a"), (rollout(1.0, total=1.1), rollout(1.0, total=1.0)))
    samples = train_samples([first, group(0.0, 0.0), group(0.0, 1.0)])
    assert [s.advantage for s in samples] == pytest.approx([1, -1, 0, 0, -1, 1])
    assert [s.prompt for s in samples] == [0, 0, 1, 1, 2, 2]


def test_failed_rollouts_are_left_out():
    mixed = RolloutGroup(task("a"), (rollout(0.0), rollout(0.0, failed=True), rollout(1.0)))
    samples = train_samples([mixed])
    assert [s.advantage for s in samples] == pytest.approx([-1.0, 1.0])


def scored(mask, behaviour):
    """A sample whose logprobs of the sampling engine are given, 0 outside the mask."""
    return TrainSample(
        tokens=torch.zeros(len(mask), dtype=torch.int64),
        targets=torch.zeros(len(mask), dtype=torch.int64),
        loss_mask=torch.tensor(mask),
        behaviour_logprobs=torch.tensor(behaviour),
        advantage=0.0,
        prompt=0,
    )


def test_mismatch_is_zero_when_both_probabilities_agree():
    logprobs = [0.0, -0.5, -1.5, -3.0]
    metrics = mismatch_metrics(
        [scored([False, True, True, True], logprobs)], [torch.tensor(logprobs)]
    )
    assert metrics["rl/probability_correlation"] == pytest.approx(1.0)
    assert metrics["rl/probability_max_difference"] == 0.0
    assert metrics["rl/mismatch_kl_nats"] == 0.0


def test_mismatch_by_hand_over_the_sampled_tokens_only():
    training, inference = np.array([0.5, 0.2, 0.9]), np.array([0.4, 0.25, 0.6])
    samples = [
        scored([False, True], [0.0, math.log(0.4)]),
        scored([True, True], [math.log(0.25), math.log(0.6)]),
    ]
    old = [torch.tensor([-9.0, math.log(0.5)]), torch.tensor([math.log(0.2), math.log(0.9)])]
    metrics = mismatch_metrics(samples, old)
    ratio = training / inference
    assert metrics["rl/probability_correlation"] == pytest.approx(
        np.corrcoef(training, inference)[0, 1], rel=1e-6
    )
    assert metrics["rl/probability_max_difference"] == pytest.approx(0.3, rel=1e-6)
    assert metrics["rl/mismatch_kl_nats"] == pytest.approx(
        np.mean(ratio - 1 - np.log(ratio)), rel=1e-5
    )


def test_rollout_metrics_average_every_sampled_rollout_that_did_not_fail():
    kept = RolloutGroup(
        task("a"),
        (
            rollout(1.0, total=1.1),
            rollout(0.0, total=0.1, tokens=(1, 2, 3, 4), reason="length"),
            rollout(0.0, failed=True),
        ),
    )
    dropped = RolloutGroup(task("b"), (rollout(0.0, tokens=(1,), reason="repetition"),))
    metrics = rollout_metrics(SampledBatch(kept=[kept], all=[kept, dropped]))
    assert metrics == pytest.approx(
        {
            "rl/reward": 1.2 / 3,
            "rl/accuracy": 1 / 3,
            "rl/format": 1.0,
            "rl/completion_length_tokens": 7 / 3,
            "rl/entropy_nats": (0 + 1 + 0 + 1 + 2 + 3 + 0) / 7,
            "rl/truncated_fraction": 1 / 3,
            "rl/repetition_fraction": 1 / 3,
            "rl/failed_rollouts": 1.0,
            "rl/groups_sampled": 2.0,
            "rl/groups_kept": 1.0,
        }
    )
