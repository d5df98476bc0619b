"""From groups of rollouts to what the trainer learns from."""

from collections.abc import Sequence

import torch

from m1.inference.recorded import unpack_experts
from m1.train.advantage import batch_advantages
from m1.train.batches import TrainSample
from m1.types import Completion, M1Error, RolloutGroup


def train_samples(
    groups: Sequence[RolloutGroup],
    *,
    scale: str = "group_std",
    replayed_experts: int | None = None,
) -> list[TrainSample]:
    """Join prompts and completions and give every rollout its group-relative advantage (Eq. 2).

    Failed rollouts are left out.

    Args:
        groups: As sampled and scored.
        scale: See `m1.train.advantage.batch_advantages`.
        replayed_experts: Number of experts of the model, where the samples are to carry those that
            the engine chose.

    Raises:
        M1Error: The experts of a completion are to be replayed, but were not recorded, or cannot
            be.
    """
    scores = [
        ([r.reward.total for r in g.rollouts], [r.reward.is_failed for r in g.rollouts])
        for g in groups
    ]
    return [
        _sample(rollout.completion, advantage, prompt, replayed_experts)
        for prompt, (group, advantages) in enumerate(
            zip(groups, batch_advantages(scores, scale=scale), strict=True)
        )
        for rollout, advantage in zip(group.rollouts, advantages, strict=True)
        if not rollout.reward.is_failed
    ]


def _sample(
    completion: Completion, advantage: float, prompt: int, replayed_experts: int | None
) -> TrainSample:
    ids = torch.tensor(completion.prompt_tokens + completion.tokens)
    num_prompt = len(completion.prompt_tokens)
    logprobs = torch.zeros(len(ids) - 1)
    logprobs[num_prompt - 1 :] = torch.tensor(completion.logprobs)
    loss_mask = torch.arange(len(ids) - 1) >= num_prompt - 1
    if completion.loss_mask is not None:
        loss_mask[num_prompt - 1 :] = torch.tensor(completion.loss_mask)
    return TrainSample(
        tokens=ids[:-1],
        targets=ids[1:],
        loss_mask=loss_mask,
        behaviour_logprobs=logprobs,
        advantage=advantage,
        prompt=prompt,
        routed_experts=None if replayed_experts is None else _experts(completion, replayed_experts),
    )


def _experts(completion: Completion, num_experts: int) -> torch.Tensor:
    """int16 [prompt + completion tokens - 1, layers, k]."""
    if completion.routed_experts is None:
        raise M1Error(
            "rl.routing_replay is 'rollout', but the engine recorded no experts; start its server "
            "with --record-experts, or set routing_replay to 'off'"
        )
    count = len(completion.prompt_tokens) + len(completion.tokens) - 1
    return unpack_experts(completion.routed_experts, num_tokens=count, num_experts=num_experts)
