"""Our losses beside TRL's GRPOTrainer, fed the same log-probabilities and advantages."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from m1.config.schema import LossConfig
from m1.train.losses import Sequences, policy_loss, settings_of, token_weights

LENGTHS = (7, 3, 5, 1)
WIDTH = max(LENGTHS)
MASK = torch.arange(WIDTH)[None] < torch.tensor(LENGTHS)[:, None]


@pytest.fixture(scope="module")
def grpo_trainer():
    pytest.importorskip("trl", reason="trl is not installed (pip install trl)")
    from trl.trainer.grpo_trainer import GRPOTrainer

    return GRPOTrainer


@pytest.fixture(scope="module")
def values():
    generator = torch.Generator().manual_seed(3)
    logprobs = -3 * torch.rand(4, WIDTH, generator=generator, dtype=torch.float64)
    noise = 0.4 * torch.randn(3, 4, WIDTH, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.2, -0.3, 0.4, -1.3], dtype=torch.float64)
    return SimpleNamespace(
        logprobs=logprobs,
        old=logprobs + noise[0],
        behaviour=logprobs + noise[0] + noise[1],
        reference=logprobs + noise[2],
        advantages=advantages,
    )


def trl_loss(trainer, values, loss_type, **settings):
    """TRL's own function on its own settings, without a model: loss and gradient."""
    logprobs = values.logprobs.clone().requires_grad_()
    fields = {
        "loss_type": loss_type,
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "importance_sampling_level": "token",
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "aux_loss_enabled": False,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "use_adaptive_entropy": False,
        "_entropy_bonus_enabled": False,
        "current_gradient_accumulation_steps": 1,
        **settings,
    }
    stub = SimpleNamespace(
        **fields,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (
            logprobs,
            torch.zeros_like(logprobs),
            0,
        ),
    )
    ids = torch.zeros(4, WIDTH, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": MASK.long(),
        "advantages": values.advantages,
        "old_per_token_logps": values.old,
        "ref_per_token_logps": values.reference,
        "importance_sampling_ratio": (values.old - values.behaviour).exp().clamp(max=1.2),
        "num_items_in_batch": MASK.sum(),
    }
    loss = trainer._compute_loss(stub, None, inputs)
    loss.backward()
    return float(loss.detach()), logprobs.grad


def our_loss(values, config):
    logprobs = values.logprobs.clone().requires_grad_()
    weights = token_weights(settings_of(config).aggregation, list(MASK), [0, 0, 1, 1])
    result = policy_loss(
        config,
        logprobs=logprobs,
        old_logprobs=values.old,
        advantages=values.advantages[:, None].expand(-1, WIDTH),
        loss_mask=MASK,
        weights=torch.stack(weights).double(),
        behaviour_logprobs=values.behaviour,
        reference_logprobs=values.reference,
        sequences=Sequences(torch.arange(4)[:, None].expand(-1, WIDTH), 4),
    )
    result.loss.backward()
    return result, logprobs.grad


def agree(ours, theirs):
    # Our weights are float32, and everything else here float64.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("config", "loss_type", "settings"),
    [
        (LossConfig(name="grpo"), "grpo", {}),
        (LossConfig(name="dapo"), "dapo", {"epsilon_high": 0.28}),
        (LossConfig(name="ppo"), "grpo", {}),
        (
            LossConfig(name="gspo"),
            "grpo",
            {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
        ),
    ],
)
def test_surrogates_and_their_gradients_agree(grpo_trainer, values, config, loss_type, settings):
    loss, gradient = trl_loss(grpo_trainer, values, loss_type, **settings)
    result, ours = our_loss(values, config)
    assert result.sums["clipped"] > 0
    assert float(result.sums["surrogate"]) == pytest.approx(loss, rel=1e-6, abs=1e-7)
    agree(ours, gradient)


@pytest.mark.parametrize("ceiling", [1.1, 5.0])
def test_cispo_agrees_where_trl_is_given_our_ceiling_itself(grpo_trainer, values, ceiling):
    """TRL clamps the weight at epsilon_high, we (Eq. 5) at 1 + eps_high."""
    loss, gradient = trl_loss(grpo_trainer, values, "cispo", epsilon_high=ceiling)
    result, ours = our_loss(values, LossConfig(clip_eps_high=ceiling - 1))
    assert float(result.loss.detach()) == pytest.approx(loss, rel=1e-6, abs=1e-7)
    agree(ours, gradient)


def test_cispo_differs_where_both_are_given_the_same_number(grpo_trainer, values):
    _, gradient = trl_loss(grpo_trainer, values, "cispo", epsilon_high=0.2)
    _, ours = our_loss(values, LossConfig(clip_eps_high=0.2))
    ratio = (values.logprobs - values.old).exp()
    is_apart = MASK & (ratio > 0.2)
    assert is_apart.sum() > 10
    expected = gradient * torch.where(is_apart, ratio.clamp(max=1.2) / 0.2, 1.0)
    agree(ours, expected)


def test_the_kl_term_and_truncated_importance_sampling_agree(grpo_trainer, values):
    loss, gradient = trl_loss(
        grpo_trainer,
        values,
        "cispo",
        epsilon_high=5.0,
        beta=0.04,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
    )
    result, ours = our_loss(values, LossConfig(kl_coefficient=0.04, behaviour_cap=1.2))
    assert float(result.sums["truncated"]) > 0
    assert float(result.loss.detach()) == pytest.approx(loss, rel=1e-6, abs=1e-7)
    agree(ours, gradient)
