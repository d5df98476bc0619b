import math

import numpy as np
import pytest
import torch

from m1.rollout.filtering import SampledBatch
from m1.train.batches import TrainSample
from m1.train.monitors import mismatch_metrics, rollout_metrics
from m1.train.samples import train_samples
from m1.types import RolloutGroup
from tests.unit.rollout.making import group, rollout, task


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
    assert metrics["rl/mismatch_ratio_max"] == pytest.approx(0.9 / 0.6, rel=1e-5)
    assert metrics["rl/perplexity"] == pytest.approx((0.5 * 0.2 * 0.9) ** (-1 / 3), rel=1e-5)


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
            "rl/failed_fraction": 1 / 4,
            "rl/completion_length_p99_tokens": np.percentile([2, 4, 1], 99),
            "rl/groups_sampled": 2.0,
            "rl/groups_kept": 1.0,
        }
    )
