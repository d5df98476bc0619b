"""Losses as pure functions of tensors. Each cites its equation in the M1 paper (arXiv 2506.13585).

Every loss is a weighted sum over tokens whose weights are fixed on the whole batch by
`token_weights`, so that it does
not change when the batch is cut into micro-batches, packed differently or spread over ranks.
Shapes: T packed tokens.
"""

from dataclasses import dataclass

import torch

from m1.config.schema import LossConfig


@dataclass(frozen=True)
class PolicyLoss:
    """A differentiable loss and the sums from which metrics are averaged."""

    loss: torch.Tensor
    """float32 scalar, to be minimised."""
    sums: dict[str, torch.Tensor]
    """Token sums, detached: `tokens`, `importance_ratio`, `clipped`, `kl`."""


def policy_loss(
    config: LossConfig,
    *,
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    weights: torch.Tensor,
) -> PolicyLoss:
    """CISPO (Eq. 4 and 5), negated for minimisation.

        L = - sum_t w_t * sg(clip(r_t, 1 - eps_low, 1 + eps_high)) * A_t * log pi(o_t)
        r_t = pi(o_t) / pi_old(o_t)

    The clipped importance weight carries no gradient, so every token keeps its own, however far its
    ratio went.
    `clip_eps_low` absent means no lower bound, as in the paper; there is no KL term.

    Args:
        config: Clip bounds.
        logprobs: float32 [T], log pi of each token under the current weights, with gradient.
        old_logprobs: float32 [T], the same under the weights before this batch's first update.
        advantages: float32 [T].
        loss_mask: bool [T], true on sampled tokens.
        weights: float32 [T] from `token_weights`.

    Returns:
        The loss and token sums.

    Raises:
        ValueError: The shapes differ.
    """
    shapes = {t.shape for t in (logprobs, old_logprobs, advantages, loss_mask, weights)}
    if len(shapes) > 1:
        raise ValueError(
            f"policy_loss needs tensors of one shape, got {sorted(map(tuple, shapes))}"
        )
    log_ratio = torch.where(loss_mask, logprobs.detach() - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    low = -torch.inf if config.clip_eps_low is None else 1.0 - config.clip_eps_low
    clipped_ratio = ratio.clamp(low, 1.0 + config.clip_eps_high)
    per_token = torch.where(loss_mask, -weights * clipped_ratio * advantages * logprobs, 0.0)
    mask = loss_mask.float()
    return PolicyLoss(
        loss=per_token.sum(),
        sums={
            "tokens": mask.sum(),
            "importance_ratio": (ratio * mask).sum(),
            "clipped": ((clipped_ratio != ratio).float() * mask).sum(),
            "kl": ((ratio - 1 - log_ratio) * mask).sum(),  # k3 estimate of KL(pi_old || pi)
        },
    )


def token_weights(
    aggregation: str, loss_masks: list[torch.Tensor], prompts: list[int]
) -> list[torch.Tensor]:
    """Weight of every token of a batch of completions; the weights of the batch sum to 1.

    `token_mean`: every sampled token counts alike over the whole batch, as most code reads Eq. 4.
    `prompt_mean`: Eq. 4 read literally: a token mean within each group, and the mean of that over
    prompts.

    Args:
        aggregation: "token_mean" or "prompt_mean".
        loss_masks: bool [T_i] for each completion.
        prompts: Prompt (group) of each completion.

    Returns:
        float32 [T_i] for each completion, zero outside the mask.
    """
    counts = [int(mask.sum()) for mask in loss_masks]
    if aggregation == "token_mean":
        total = sum(counts)
        return [mask.float() / total for mask in loss_masks]
    if aggregation != "prompt_mean":
        raise ValueError(f"unknown aggregation {aggregation!r}; use token_mean or prompt_mean")
    per_prompt: dict[int, int] = {}
    for prompt, count in zip(prompts, counts, strict=True):
        per_prompt[prompt] = per_prompt.get(prompt, 0) + count
    num_prompts = len(per_prompt)
    return [
        mask.float() / (per_prompt[prompt] * num_prompts)
        for mask, prompt in zip(loss_masks, prompts, strict=True)
    ]
