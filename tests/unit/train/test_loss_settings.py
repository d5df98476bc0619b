"""Objectives other than CISPO, on numbers made by hand."""

import math

import pytest
import torch

from m1.config.schema import LossConfig
from m1.train.losses import Sequences, policy_loss

# Inside the trust region; above it; below it; and beyond the bounds where they do not bind.
RATIOS = torch.tensor([1.1, 1.25, 0.7, 0.7, 1.5], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, 2.0, -1.0, 1.0, -2.0], dtype=torch.float64)
WEIGHTS = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64)
LOGPROBS = torch.tensor([0.5, 0.25, 0.05, 0.9, 0.08], dtype=torch.float64).log()


def gradient(config, **changes):
    logprobs = LOGPROBS.clone().requires_grad_()
    arguments = {
        "old_logprobs": LOGPROBS - RATIOS.log(),
        "advantages": ADVANTAGES,
        "loss_mask": torch.ones(5, dtype=torch.bool),
        "weights": WEIGHTS,
        **changes,
    }
    result = policy_loss(config, logprobs=logprobs, **arguments)
    result.loss.backward()
    return logprobs.grad, {name: float(value) for name, value in result.sums.items()}


REINFORCE = -WEIGHTS * RATIOS * ADVANTAGES


@pytest.mark.parametrize(
    ("name", "dropped"), [("reinforce", []), ("ppo", [1, 2]), ("grpo", [1, 2]), ("dapo", [2])]
)
def test_a_token_that_leaves_the_trust_region_on_its_own_side_gets_no_gradient(name, dropped):
    expected = REINFORCE.clone()
    expected[dropped] = 0.0
    found, sums = gradient(LossConfig(name=name))
    torch.testing.assert_close(found, expected)
    assert sums["clipped"] == len(dropped)


@pytest.mark.parametrize(("name", "low", "high"), [("ppo", 0.2, 0.2), ("dapo", 0.2, 0.28)])
def test_gradient_and_surrogate_are_those_of_the_clipped_surrogate(name, low, high):
    logprobs = LOGPROBS.clone().requires_grad_()
    ratio = (logprobs - (LOGPROBS - RATIOS.log())).exp()
    bounded = ratio.clamp(1 - low, 1 + high)
    surrogate = -(WEIGHTS * torch.minimum(ratio * ADVANTAGES, bounded * ADVANTAGES)).sum()
    surrogate.backward()
    found, sums = gradient(LossConfig(name=name))
    torch.testing.assert_close(found, logprobs.grad)
    assert sums["surrogate"] == pytest.approx(float(surrogate), rel=1e-12)


def test_cispo_with_the_mask_of_ppo_drops_what_ppo_drops():
    found, _ = gradient(LossConfig(clip_eps_high=0.3, mask_eps_low=0.2, mask_eps_high=0.2))
    expected = -WEIGHTS * RATIOS.clamp(max=1.3) * ADVANTAGES
    expected[[1, 2]] = 0.0
    torch.testing.assert_close(found, expected)


def test_bounds_of_the_recipe_take_the_place_of_the_names():
    found, _ = gradient(LossConfig(name="grpo", mask_eps_high=0.3, mask_eps_low=0.4))
    torch.testing.assert_close(found, REINFORCE)


def test_with_one_update_a_batch_every_objective_is_reinforce():
    expected = -WEIGHTS * ADVANTAGES
    index = torch.arange(5)
    for name in ("cispo", "reinforce", "ppo", "grpo", "dapo", "gspo"):
        found, sums = gradient(
            LossConfig(name=name), old_logprobs=LOGPROBS, sequences=Sequences(index, 5)
        )
        torch.testing.assert_close(found, expected)
        assert sums["clipped"] == 0.0


@pytest.mark.parametrize("low", [1.0, 50.0])
def test_a_large_eps_low_is_no_lower_bound(low):
    torch.testing.assert_close(
        gradient(LossConfig(clip_eps_low=low))[0], gradient(LossConfig())[0], rtol=0, atol=0
    )


def test_gspo_takes_the_geometric_mean_of_each_sequence_and_drops_it_whole():
    # [1.1, 1.25] outside on the side of its advantage; [0.7, 0.7] not; the last is masked.
    index, mask = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([True, True, True, True, False])
    advantages = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    found, sums = gradient(
        LossConfig(name="gspo"),
        advantages=advantages,
        loss_mask=mask,
        sequences=Sequences(index, 2),
    )
    expected = -WEIGHTS * 0.7
    expected[[0, 1, 4]] = 0.0
    torch.testing.assert_close(found, expected)
    assert sums["clipped"] == 2.0
    assert sums["importance_ratio"] == pytest.approx(2 * math.sqrt(1.1 * 1.25) + 2 * 0.7)


def test_gspo_sees_the_parts_of_a_sequence_on_other_ranks():
    together = Sequences(torch.tensor([0, 0, 1, 1, 1]), 2)
    whole, _ = gradient(LossConfig(name="gspo", mask_eps_high=9.0), sequences=together)
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for number, ratio in enumerate(RATIOS.log()):
        sums[:, together.index[number]] += torch.stack([ratio, torch.ones_like(ratio)])
    half = slice(0, 5, 2)
    part = Sequences(together.index[half], 2, sum_over_ranks=lambda _: sums)
    logprobs = LOGPROBS[half].clone().requires_grad_()
    policy_loss(
        LossConfig(name="gspo", mask_eps_high=9.0),
        logprobs=logprobs,
        old_logprobs=(LOGPROBS - RATIOS.log())[half],
        advantages=ADVANTAGES[half],
        loss_mask=torch.ones(3, dtype=torch.bool),
        weights=WEIGHTS[half],
        sequences=part,
    ).loss.backward()
    torch.testing.assert_close(logprobs.grad, whole[half])


def test_truncated_importance_sampling_multiplies_by_the_capped_ratio_of_trainer_and_engine():
    drift = torch.tensor([0.5, 1.0, 1.9, 2.1, 30.0], dtype=torch.float64)
    behaviour = LOGPROBS - RATIOS.log() - drift.log()
    found, sums = gradient(
        LossConfig(name="reinforce", behaviour_cap=2.0), behaviour_logprobs=behaviour
    )
    torch.testing.assert_close(found, REINFORCE * drift.clamp(max=2.0))
    assert sums["truncated"] == 2.0
    assert sums["behaviour_ratio"] == pytest.approx(35.5)


def test_the_kl_term_has_the_gradient_of_its_estimator():
    reference = torch.tensor([0.4, 0.3, 0.05, 0.5, 0.2], dtype=torch.float64).log()
    found, sums = gradient(
        LossConfig(name="reinforce", kl_coefficient=0.1), reference_logprobs=reference
    )
    ratio = (reference - LOGPROBS).exp()  # d/dx [exp(ref - x) - (ref - x) - 1] = 1 - exp(ref - x)
    torch.testing.assert_close(found, REINFORCE + 0.1 * WEIGHTS * (1 - ratio))
    assert sums["reference_kl"] == pytest.approx(float((ratio - 1 - ratio.log()).sum()))


def test_the_gradient_share_of_rare_tokens_by_hand():
    _, sums = gradient(LossConfig(name="grpo"))
    sizes = (WEIGHTS * RATIOS * ADVANTAGES.abs() * (1 - LOGPROBS.exp())).tolist()
    assert sums["gradient"] == pytest.approx(sizes[0] + sizes[3] + sizes[4])
    assert sums["gradient_rare"] == pytest.approx(sizes[4])


@pytest.mark.parametrize(
    "config",
    [LossConfig(name="gspo"), LossConfig(behaviour_cap=2.0), LossConfig(kl_coefficient=0.1)],
)
def test_what_an_objective_needs_is_asked_for(config):
    with pytest.raises(ValueError, match="give them"):
        gradient(config)
