"""From groups of rollouts to what the trainer learns from."""

from collections.abc import Sequence

import numpy as np
import torch

from m1.train.advantage import batch_advantages
from m1.train.batches import TrainSample
from m1.types import Completion, M1Error, RolloutGroup


def train_samples(
    groups: Sequence[RolloutGroup], *, scale: str = "group_std", replays_routing: bool = False
) -> list[TrainSample]:
    """Join prompts and completions and give every rollout its group-relative advantage (Eq. 2).

    Failed rollouts are left out; `scale` is that of `m1.train.advantage.batch_advantages`. With
    `replays_routing` the samples carry the experts that the engine chose.

    Raises:
        M1Error: The experts of a completion are to be replayed, but were not recorded.
    """
    scores = [
        ([r.reward.total for r in g.rollouts], [r.reward.is_failed for r in g.rollouts])
        for g in groups
    ]
    return [
        _sample(rollout.completion, advantage, prompt, replays_routing=replays_routing)
        for prompt, (group, advantages) in enumerate(
            zip(groups, batch_advantages(scores, scale=scale), strict=True)
        )
        for rollout, advantage in zip(group.rollouts, advantages, strict=True)
        if not rollout.reward.is_failed
    ]


def _sample(
    completion: Completion, advantage: float, prompt: int, *, replays_routing: bool
) -> TrainSample:
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
        routed_experts=_experts(completion) if replays_routing else None,
    )


def _experts(completion: Completion) -> torch.Tensor:
    """int16 [prompt + completion tokens - 1, layers, k]."""
    found = completion.routed_experts
    count = len(completion.prompt_tokens) + len(completion.tokens) - 1
    if found is None or len(found.values) != 2 * count * found.num_layers * found.top_k:
        told = "none" if found is None else f"{len(found.values)} bytes"
        raise M1Error(
            f"the engine recorded {told} of experts for a completion of {count + 1} tokens, but "
            "rl.routing_replay needs those of every token but the last; set it to 'off', or sample "
            "with an engine that records them"
        )
    values = np.frombuffer(found.values, dtype=np.int16).copy()
    return torch.from_numpy(values).view(count, found.num_layers, found.top_k)
