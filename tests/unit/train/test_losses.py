import math

import pytest
import torch

from m1.config.schema import LossConfig
from m1.train.losses import policy_loss

# Ceiling 1 + eps_high = 2: a clamp at eps_high itself would flatten all ratios above 1.
CONFIG = LossConfig(clip_eps_high=1.0)
RATIOS = torch.tensor([0.25, 1.0, 1.5, 8.0], dtype=torch.float64)
CLIPPED = torch.tensor([0.25, 1.0, 1.5, 2.0], dtype=torch.float64)
ADVANTAGES = torch.tensor([2.0, -1.0, 0.5, 3.0], dtype=torch.float64)
WEIGHTS = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


def logprobs_of(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log().requires_grad_()


def four_tokens(config=CONFIG, **changes):
    logprobs = logprobs_of(0.5, 0.25, 0.125, 0.9)
    arguments = {
        "logprobs": logprobs,
        "old_logprobs": logprobs.detach() - RATIOS.log(),
        "advantages": ADVANTAGES,
        "loss_mask": torch.ones(4, dtype=torch.bool),
        "weights": WEIGHTS,
        **changes,
    }
    return logprobs, policy_loss(config, **arguments)


def test_the_loss_by_hand():
    _, result = four_tokens()
    expected = -(
        0.1 * 0.25 * 2.0 * math.log(0.5)
        + 0.2 * 1.0 * -1.0 * math.log(0.25)
        + 0.3 * 1.5 * 0.5 * math.log(0.125)
        + 0.4 * 2.0 * 3.0 * math.log(0.9)
    )
    assert float(result.loss.detach()) == pytest.approx(expected, rel=1e-12)


def test_the_sums_by_hand():
    _, result = four_tokens()
    sums = {name: float(value) for name, value in result.sums.items()}
    kl = sum(r - 1 - math.log(r) for r in (0.25, 1.0, 1.5, 8.0))
    # |w c A| (1 - pi): 0.05 * 0.5, 0.2 * 0.75, 0.225 * 0.875, 2.4 * 0.1; none is rare.
    expected = {
        "tokens": 4.0,
        "importance_ratio": 10.75,
        "clipped": 1.0,
        "kl": kl,
        "surrogate": float(result.loss.detach()),
        "gradient": 0.025 + 0.15 + 0.196875 + 0.24,
        "gradient_rare": 0.0,
    }
    assert sums == pytest.approx(expected, rel=1e-6)
    assert not any(value.requires_grad for value in result.sums.values())


def test_the_importance_weight_carries_no_gradient():
    logprobs, result = four_tokens()
    result.loss.backward()
    torch.testing.assert_close(logprobs.grad, -WEIGHTS * CLIPPED * ADVANTAGES)


@pytest.mark.parametrize("name", ["ppo", "grpo", "dapo"])
def test_a_token_far_above_the_ceiling_keeps_the_clipped_gradient_that_others_drop(name):
    logprobs, result = four_tokens()
    result.loss.backward()
    assert logprobs.grad[3] == pytest.approx(-0.4 * 2.0 * 3.0)
    logprobs, result = four_tokens(LossConfig(name=name))
    result.loss.backward()
    assert logprobs.grad[3] == 0.0


def test_without_a_lower_bound_small_ratios_stay_small():
    logprobs, result = four_tokens()
    result.loss.backward()
    assert logprobs.grad[0] == pytest.approx(-0.1 * 0.25 * 2.0)


def test_a_lower_bound_lifts_small_ratios_to_one_minus_eps_low():
    logprobs, result = four_tokens(LossConfig(clip_eps_high=1.0, clip_eps_low=0.6))
    result.loss.backward()
    assert logprobs.grad[0] == pytest.approx(-0.1 * 0.4 * 2.0)
    assert float(result.sums["clipped"]) == 2.0


def test_at_ratio_one_the_gradient_is_that_of_reinforce():
    logprobs = logprobs_of(0.5, 0.25, 0.125, 0.9)
    _, result = four_tokens(logprobs=logprobs, old_logprobs=logprobs.detach().clone())
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    reinforce = -(WEIGHTS * ADVANTAGES * logprobs).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(reinforce, logprobs)[0])


@pytest.mark.parametrize("value", [0.0, math.inf, -math.inf, math.nan])
def test_masked_tokens_contribute_nothing_whatever_they_hold(value):
    mask = torch.tensor([True, False, True, True])
    logprobs = logprobs_of(0.5, 0.25, 0.125, 0.9)
    old = logprobs.detach() - RATIOS.log()
    # 0.0 keeps the numbers as they are; the others stand in logprobs and old_logprobs in turn.
    odd = old.clone()
    odd[1] = old[1] if value == 0.0 else value
    _, result = four_tokens(logprobs=logprobs, old_logprobs=odd, loss_mask=mask)
    result.loss.backward()
    kept = -WEIGHTS * CLIPPED * ADVANTAGES * mask
    torch.testing.assert_close(logprobs.grad, kept)
    torch.testing.assert_close(result.loss.detach(), (kept * logprobs.detach()).sum())
    assert float(result.sums["tokens"]) == 3.0
    assert all(torch.isfinite(total) for total in result.sums.values())

    current = logprobs.detach().clone()
    current[1] = current[1] if value == 0.0 else value
    current.requires_grad_()
    _, result = four_tokens(logprobs=current, old_logprobs=old, loss_mask=mask)
    result.loss.backward()
    torch.testing.assert_close(current.grad, kept)
    torch.testing.assert_close(result.loss.detach(), (kept * logprobs.detach()).sum())


def test_an_overflowing_ratio_is_clipped_and_not_infinite():
    logprobs = torch.tensor([-1.0], requires_grad=True)
    one = torch.ones(1)
    result = policy_loss(
        CONFIG,
        logprobs=logprobs,
        old_logprobs=torch.tensor([-1000.0]),
        advantages=one,
        loss_mask=one.bool(),
        weights=one,
    )
    result.loss.backward()
    assert float(logprobs.grad) == -2.0


def test_tensors_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got \[\(3,\), \(4,\)\]"):
        four_tokens(weights=torch.ones(3))
