"""What no update may come of: the weights stay as they were, and the next update works."""

import math

import pytest
import torch

from m1.config.schema import LossConfig, OptimizerConfig, ParallelConfig, RlConfig
from m1.train.batches import TrainSample
from m1.train.reference import Reference
from m1.train.trainer import Trainer
from m1.train.updates import Scored, score_samples, update

LENGTH = 8


@pytest.fixture(scope="module")
def trainer(process_group, tiny_config):
    config = tiny_config.model_copy(
        update={"num_layers": 2, "layer_pattern": ("lightning", "softmax")}
    )
    optimizer = OptimizerConfig(lr=1e-3)
    return Trainer(config, optimizer, vocab_size=64, seed=1, parallel=ParallelConfig())


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator().manual_seed(1)
    return [
        TrainSample(
            tokens=torch.randint(64, (LENGTH,), generator=generator),
            targets=torch.randint(64, (LENGTH,), generator=generator),
            loss_mask=torch.arange(LENGTH) >= 3,
            behaviour_logprobs=torch.full((LENGTH,), -2.0),
            advantage=(1.0, -1.0)[number % 2],
            prompt=number // 2,
        )
        for number in range(4)
    ]


def config(*, updates=1, skip=None, **loss):
    return RlConfig(
        num_steps=2,
        prompts_per_step=2,
        group_size=2,
        updates_per_step=updates,
        skip_grad_norm=skip,
        loss=LossConfig(**loss),
        optimizer=OptimizerConfig(lr=1e-3),
    )


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def is_changed(trainer, before):
    return any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def scored(trainer, samples):
    return score_samples(trainer, samples, config())


@pytest.mark.parametrize("value", [math.nan, -math.inf, -1e4])
def test_a_ratio_without_bounds_makes_no_update_where_nothing_clips_it(trainer, samples, value):
    old = scored(trainer, samples)
    old[0] = old[0].clone()
    old[0][LENGTH - 1] = value
    before = weights(trainer)
    metrics = update(trainer, samples, Scored(old), config(name="reinforce"), step=0)
    assert (metrics["rl/updates"], metrics["rl/updates_skipped"]) == (0.0, 1.0)
    assert all(math.isfinite(x) for x in metrics.values())
    assert not is_changed(trainer, before)
    clean = update(trainer, samples, Scored(scored(trainer, samples)), config(), step=0)
    assert clean["rl/updates"] == 1.0 and is_changed(trainer, before)


def test_cispo_clips_an_infinite_ratio_and_goes_on(trainer, samples):
    old = scored(trainer, samples)
    old[0] = torch.full_like(old[0], -math.inf)
    before = weights(trainer)
    metrics = update(trainer, samples, Scored(old), config(), step=0)
    assert metrics["rl/updates"] == 1.0 and math.isfinite(metrics["rl/grad_norm"])
    assert metrics["rl/clip_fraction"] == pytest.approx(1 / 4)
    assert is_changed(trainer, before)


def test_only_the_poisoned_update_of_a_step_is_left_out(trainer, samples):
    old = scored(trainer, samples)
    old[3] = torch.full_like(old[3], math.nan)  # of the second prompt
    metrics = update(trainer, samples, Scored(old), config(updates=2), step=0)
    assert (metrics["rl/updates"], metrics["rl/updates_skipped"]) == (1.0, 1.0)
    assert math.isfinite(metrics["rl/loss"])


def test_a_gradient_above_the_guard_makes_no_update(trainer, samples):
    old = scored(trainer, samples)
    norm = update(trainer, samples, Scored(old), config(), step=0)["rl/grad_norm"]
    before = weights(trainer)
    skipped = update(trainer, samples, Scored(old), config(skip=norm / 10), step=0)
    assert skipped["rl/updates_skipped"] == 1.0 and not is_changed(trainer, before)


def test_the_reference_scores_and_leaves_the_weights_bit_by_bit(trainer, samples):
    reference = Reference(trainer.model)
    first = scored(trainer, samples)
    update(trainer, samples, Scored(first), config(), step=0)
    before = weights(trainer)
    with reference.in_place():
        again = scored(trainer, samples)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not is_changed(trainer, before)
    kl = update(trainer, samples, Scored(before_update := scored(trainer, samples), again),
                config(kl_coefficient=0.1), step=0)["rl/reference_kl_nats"]  # fmt: skip
    gap = torch.cat(
        [(a - b)[s.loss_mask] for a, b, s in zip(again, before_update, samples, strict=True)]
    )
    assert kl == pytest.approx(float((gap.exp() - 1 - gap).mean()), rel=1e-3) and kl > 0
