"""From groups of rollouts to what the trainer learns from."""

from collections.abc import Sequence

import torch

from m1.train.advantage import batch_advantages
from m1.train.batches import TrainSample
from m1.types import Completion, RolloutGroup


def train_samples(groups: Sequence[RolloutGroup], *, scale: str = "group_std") -> list[TrainSample]:
    """Join prompts and completions and give every rollout its group-relative advantage (Eq. 2).

    Failed rollouts are left out; `scale` is that of `m1.train.advantage.batch_advantages`.
    """
    scores = [
        ([r.reward.total for r in g.rollouts], [r.reward.is_failed for r in g.rollouts])
        for g in groups
    ]
    return [
        _sample(rollout.completion, advantage, prompt)
        for prompt, (group, advantages) in enumerate(
            zip(groups, batch_advantages(scores, scale=scale), strict=True)
        )
        for rollout, advantage in zip(group.rollouts, advantages, strict=True)
        if not rollout.reward.is_failed
    ]


def _sample(completion: Completion, advantage: float, prompt: int) -> TrainSample:
    ids = torch.tensor(completion.prompt_tokens + completion.tokens)
    num_prompt = len(completion.prompt_tokens)
    logprobs = torch.zeros(len(ids) - 1)
    logprobs[num_prompt - 1 :] = torch.tensor(completion.logprobs)
    return TrainSample(
        tokens=ids[:-1],
        targets=ids[1:],
        loss_mask=torch.arange(len(ids) - 1) >= num_prompt - 1,
        behaviour_logprobs=logprobs,
        advantage=advantage,
        prompt=prompt,
    )
