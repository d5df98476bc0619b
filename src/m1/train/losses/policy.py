"""The unified policy objective (M1 Eq. 6-7), of which CISPO, PPO and the others are settings.

Shapes: T tokens, packed [T] or padded [B, T]; N sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from m1.config.schema import LossConfig
from m1.train.losses.settings import LossSettings, settings_of

RARE_PROBABILITY = 0.1
"""Tokens below it count as rare in the gradient's share (M1 sec. 3.1: forks of reasoning)."""
Sum = Callable[[torch.Tensor], torch.Tensor]


def _here(values: torch.Tensor) -> torch.Tensor:
    return values


@dataclass(frozen=True)
class Sequences:
    """Which sequence a token belongs to, for what is defined by sequences."""

    index: torch.Tensor
    """int64, of the tokens' shape; any number below `num` outside the mask."""
    num: int
    """N."""
    sum_over_ranks: Sum = _here
    """Adds up [2, N] over ranks that hold parts of the same sequences."""


@dataclass(frozen=True)
class PolicyLoss:
    """A differentiable loss and the sums from which metrics are averaged."""

    loss: torch.Tensor
    """float32 scalar, to be minimised."""
    sums: dict[str, torch.Tensor]
    """Detached sums over sampled tokens; see `policy_loss`."""


def policy_loss(
    config: LossConfig,
    *,
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    weights: torch.Tensor,
    behaviour_logprobs: torch.Tensor | None = None,
    reference_logprobs: torch.Tensor | None = None,
    sequences: Sequences | None = None,
) -> PolicyLoss:
    """The unified objective, negated for minimisation (Eq. 6, and a KL term that it leaves out).

        L = - sum_t w_t * sg(c_t * b_t) * A_t * M_t * log pi(o_t)  +  beta * sum_t w_t * k_t
        r_t = pi(o_t) / pi_old(o_t)      c_t = clip(r_t, 1 - eps_low, 1 + eps_high)       Eq. 5
        M_t = 0 if A_t > 0 and r_t > 1 + eps'_high, or A_t < 0 and r_t < 1 - eps'_low; else 1  Eq. 7
        b_t = min(pi_old(o_t) / pi_behaviour(o_t), cap)          truncated importance sampling
        k_t = q_t - 1 - log q_t,  q_t = pi_ref(o_t) / pi(o_t)       estimates KL(pi || pi_ref)

    CISPO has no M and no floor, so every token keeps a gradient, however far its ratio went. PPO,
    GRPO and DAPO have M and an unclipped c: the gradient of their surrogate min(r A, clip(r) A).
    Its value, which differs from L's, is the sum `surrogate`. In GSPO r is the geometric mean of
    the completion's ratios.

    Args:
        config: The objective.
        logprobs: float32, log pi of each token under the current weights, with gradient.
        old_logprobs: float32, the same under the weights before this batch's first update.
        advantages: float32.
        loss_mask: bool, true on sampled tokens; what stands elsewhere does not matter.
        weights: float32 from `token_weights`.
        behaviour_logprobs: float32, by the engine that sampled; needed with `behaviour_cap`.
        reference_logprobs: float32, under the reference weights; needed with `kl_coefficient`.
        sequences: Needed by objectives at sequence level.

    Returns:
        The loss, and sums over sampled tokens: `tokens`; `importance_ratio`; `clipped`, tokens
        whose weight was clamped or whose gradient was dropped; `kl`, of the old policy from this
        one; `surrogate`, weighted; `gradient`, the size |w c b A M| (1 - pi) of the loss's gradient
        on the logits, and `gradient_rare`, its part from tokens with pi < 0.1; with a cap
        `behaviour_ratio` and `truncated`; with a reference `reference_kl`.

    Raises:
        ValueError: The shapes differ, or something needed is not given.
    """
    _require(config, logprobs, old_logprobs, advantages, loss_mask, weights)
    settings = settings_of(config)
    current = logprobs.detach()
    token_ratio = torch.where(loss_mask, current - old_logprobs, 0.0)
    log_ratio = token_ratio
    if settings.is_sequence_level:
        log_ratio = _sequence_means(token_ratio, loss_mask, sequences)
    ratio = log_ratio.exp()
    clipped = _clip(ratio, settings.clip_eps_low, settings.clip_eps_high)
    kept = _trust_region(settings, ratio, advantages)
    factor = torch.where(kept, clipped, 0.0)
    mask = loss_mask.float()
    sums = {
        "tokens": mask.sum(),
        "importance_ratio": (ratio * mask).sum(),
        "clipped": (((clipped != ratio) | ~kept).float() * mask).sum(),
        # k3 estimate of KL(pi_old || pi)
        "kl": ((token_ratio.exp() - 1 - token_ratio) * mask).sum(),
        "surrogate": torch.where(
            loss_mask, weights * _surrogate(settings, ratio, clipped, advantages, current), 0.0
        ).sum(),
    }
    if config.behaviour_cap is not None:
        behaviour = _given(behaviour_logprobs, "behaviour_cap", "behaviour_logprobs")
        drift = torch.where(loss_mask, old_logprobs - behaviour, 0.0).exp()
        factor = factor * drift.clamp(max=config.behaviour_cap)
        sums["behaviour_ratio"] = (drift * mask).sum()
        sums["truncated"] = ((drift > config.behaviour_cap).float() * mask).sum()
    coefficient = torch.where(loss_mask, weights * factor * advantages, 0.0)
    loss = -torch.where(loss_mask, coefficient * logprobs, 0.0).sum()
    size = torch.where(loss_mask, coefficient.abs() * (1 - current.exp()), 0.0)
    sums["gradient"] = size.sum()
    sums["gradient_rare"] = (size * (current.exp() < RARE_PROBABILITY)).sum()
    if config.kl_coefficient:
        reference = _given(reference_logprobs, "kl_coefficient", "reference_logprobs")
        gap = torch.where(loss_mask, reference - logprobs, 0.0)
        divergence = gap.exp() - 1 - gap
        loss = (
            loss + config.kl_coefficient * (torch.where(loss_mask, weights, 0) * divergence).sum()
        )
        sums["reference_kl"] = divergence.detach().sum()
    return PolicyLoss(loss=loss, sums=sums)


def _require(config: LossConfig, *tensors: torch.Tensor) -> None:
    shapes = {tensor.shape for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(
            f"policy_loss needs tensors of one shape, got {sorted(map(tuple, shapes))}"
        )


def _given(tensor: torch.Tensor | None, setting: str, name: str) -> torch.Tensor:
    if tensor is None:
        raise ValueError(f"rl.loss.{setting} is set, but {name} are not given; give them")
    return tensor


def _sequence_means(
    values: torch.Tensor, loss_mask: torch.Tensor, sequences: Sequences | None
) -> torch.Tensor:
    """Mean of each sequence's sampled tokens, at each of its tokens (GSPO Eq. 7)."""
    if sequences is None:
        raise ValueError("an objective at sequence level needs sequences; give them")
    index = sequences.index.flatten()
    parts = torch.stack([values.flatten(), loss_mask.flatten().to(values.dtype)])
    sums = torch.zeros(2, sequences.num, dtype=values.dtype, device=values.device)
    sums = sequences.sum_over_ranks(sums.index_add(1, index, parts))
    means = sums[0] / sums[1].clamp(min=1)
    return torch.where(loss_mask, means[index].view_as(values), 0.0)


def _clip(ratio: torch.Tensor, low: float | None, high: float | None) -> torch.Tensor:
    """The ratio within [1 - low, 1 + high], each where it is given."""
    floor = -torch.inf if low is None else 1.0 - low
    ceiling = torch.inf if high is None else 1.0 + high
    return ratio.clamp(floor, ceiling)


def _trust_region(
    settings: LossSettings, ratio: torch.Tensor, advantages: torch.Tensor
) -> torch.Tensor:
    """M of Eq. 7 as booleans."""
    kept = torch.ones_like(ratio, dtype=torch.bool)
    if settings.mask_eps_high is not None:
        kept &= ~((advantages > 0) & (ratio > 1 + settings.mask_eps_high))
    if settings.mask_eps_low is not None:
        kept &= ~((advantages < 0) & (ratio < 1 - settings.mask_eps_low))
    return kept


def _surrogate(
    settings: LossSettings,
    ratio: torch.Tensor,
    clipped: torch.Tensor,
    advantages: torch.Tensor,
    logprobs: torch.Tensor,
) -> torch.Tensor:
    """What the objective is usually written as, negated: -min(r A, clip(r) A), or -c A log pi."""
    if settings.mask_eps_low is None and settings.mask_eps_high is None:
        return -clipped * advantages * logprobs
    bounded = _clip(ratio, settings.mask_eps_low, settings.mask_eps_high)
    return -torch.minimum(ratio * advantages, bounded * advantages)
