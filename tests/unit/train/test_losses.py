import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.config.schema import LossConfig
from m1.train.losses import policy_loss, token_weights

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
    expected = {"tokens": 4.0, "importance_ratio": 10.75, "clipped": 1.0, "kl": kl}
    assert sums == pytest.approx(expected, rel=1e-12)
    assert not any(value.requires_grad for value in result.sums.values())


def test_the_importance_weight_carries_no_gradient():
    logprobs, result = four_tokens()
    result.loss.backward()
    torch.testing.assert_close(logprobs.grad, -WEIGHTS * CLIPPED * ADVANTAGES)


def test_a_token_far_above_the_ceiling_keeps_its_gradient_where_ppo_drops_it():
    logprobs, result = four_tokens()
    result.loss.backward()
    assert logprobs.grad[3] == pytest.approx(-0.4 * 2.0 * 3.0)

    under_ppo = logprobs.detach().clone().requires_grad_()
    ratio = (under_ppo - (logprobs.detach() - RATIOS.log())).exp()
    surrogate = torch.minimum(ratio * ADVANTAGES, ratio.clamp(0.0, 2.0) * ADVANTAGES)
    (-WEIGHTS * surrogate).sum().backward()
    assert under_ppo.grad[3] == 0.0


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


MASKS = [
    torch.tensor([False, True, True]),
    torch.tensor([True]),
    torch.tensor([False, False, True, True, True]),
]


def test_token_mean_weighs_every_sampled_token_alike():
    weights = token_weights("token_mean", MASKS, [0, 0, 1])
    torch.testing.assert_close(weights[0], torch.tensor([0, 1 / 6, 1 / 6]))
    torch.testing.assert_close(weights[1], torch.tensor([1 / 6]))
    torch.testing.assert_close(weights[2], torch.tensor([0, 0, 1 / 6, 1 / 6, 1 / 6]))


def test_prompt_mean_weighs_every_prompt_alike_and_its_tokens_alike():
    # Two prompts, of 2 and of 1 + 3 tokens.
    first, second, third = token_weights("prompt_mean", MASKS, [7, 9, 9])
    torch.testing.assert_close(first, torch.tensor([0, 1 / 4, 1 / 4]))
    torch.testing.assert_close(second, torch.tensor([1 / 8]))
    torch.testing.assert_close(third, torch.tensor([0, 0, 1 / 8, 1 / 8, 1 / 8]))


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="sample_mean"):
        token_weights("sample_mean", MASKS, [0, 0, 1])


completions = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.booleans(), max_size=6).map(lambda m: [*m, True])),
    min_size=1,
    max_size=8,
)
aggregations = st.sampled_from(["token_mean", "prompt_mean"])


@given(completions, aggregations)
def test_weights_sum_to_one_and_vanish_outside_the_mask(batch, aggregation):
    masks = [torch.tensor(mask) for _, mask in batch]
    weights = token_weights(aggregation, masks, [prompt for prompt, _ in batch])
    assert float(torch.cat(weights).sum()) == pytest.approx(1.0, abs=1e-6)
    for weight, mask in zip(weights, masks, strict=True):
        assert torch.equal(weight > 0, mask)


@settings(max_examples=50)
@given(completions, aggregations, st.randoms(use_true_random=False), st.data())
def test_loss_and_gradient_do_not_depend_on_micro_batches_or_order(
    batch, aggregation, random, data
):
    masks = [torch.tensor(mask) for _, mask in batch]
    weights = token_weights(aggregation, masks, [prompt for prompt, _ in batch])
    generator = torch.Generator().manual_seed(0)
    tokens = [
        {
            "old_logprobs": -torch.rand(len(mask), generator=generator, dtype=torch.float64),
            "advantages": torch.randn(len(mask), generator=generator, dtype=torch.float64),
            "loss_mask": mask,
            "weights": weight.double(),
        }
        for mask, weight in zip(masks, weights, strict=True)
    ]
    values = [-3 * torch.rand(len(m), generator=generator, dtype=torch.float64) for m in masks]

    def run(groups):
        leaves = [value.clone().requires_grad_() for value in values]
        total = torch.zeros((), dtype=torch.float64)
        for group in groups:
            joined = {name: torch.cat([tokens[i][name] for i in group]) for name in tokens[0]}
            logprobs = torch.cat([leaves[i] for i in group])
            loss = policy_loss(CONFIG, logprobs=logprobs, **joined).loss
            loss.backward()
            total += loss.detach()
        return total, torch.cat([leaf.grad for leaf in leaves])

    order = list(range(len(batch)))
    whole, whole_gradient = run([order])
    random.shuffle(order)
    size = data.draw(st.integers(1, len(batch)))
    cut, cut_gradient = run([order[i : i + size] for i in range(0, len(order), size)])
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-14)
    assert torch.equal(cut_gradient, whole_gradient)
