"""Which rollouts count, and which groups tell something (paper sec. 3.1: dynamic sampling)."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from m1.config.schema import DynamicSamplingConfig
from m1.types import Rollout, RolloutGroup, Task

MIN_SCORED = 2
"""Scored completions below which a group has no relative advantage."""
_LOGPROB_SLACK = 1e-3
"""By rounding, the log-probability of a sure token may exceed 0 by less."""
Sampler = Callable[[Sequence[Task], int], list[RolloutGroup]]
"""(tasks, seed) -> their groups, screened."""


@dataclass(frozen=True)
class SampledBatch:
    """Groups sampled for one step."""

    kept: list[RolloutGroup]
    """Groups to train on."""
    all: list[RolloutGroup]
    """Every group that was sampled, for unbiased metrics."""
    reason: str = ""
    """Why none was kept, for the user."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the sampling itself."""


def is_informative(accuracies: Sequence[float], is_failed: Sequence[bool] = ()) -> bool:
    """Whether a group's accuracy, never its shaped reward, lies strictly between 0 and 1."""
    failed = list(is_failed) or [False] * len(accuracies)
    usable = [a for a, f in zip(accuracies, failed, strict=True) if not f]
    return len(usable) >= MIN_SCORED and 0.0 < sum(usable) / len(usable) < 1.0


def is_kept(group: RolloutGroup, config: DynamicSamplingConfig) -> bool:
    """Whether to train on a group."""
    failed = [r.reward.is_failed for r in group.rollouts]
    if not config.enabled:
        return failed.count(False) >= MIN_SCORED
    return is_informative([r.reward.accuracy for r in group.rollouts], failed)


def fault_of(rollout: Rollout, *, num_tokens: int) -> str | None:
    """What makes a rollout unfit to learn from, whoever made it; None for nothing.

    Args:
        rollout: As an engine and a verifier made it.
        num_tokens: Size of the tokenizer.
    """
    completion, reward = rollout.completion, rollout.reward
    count = len(completion.tokens)
    fields = (completion.logprobs, completion.entropies, completion.policy_versions)
    if not count:
        return "no_tokens"
    if any(len(values) != count for values in fields):
        return "lengths_differ"
    if not all(0 <= token < num_tokens for token in completion.tokens):
        return "unknown_tokens"
    if not all(math.isfinite(x) and x <= _LOGPROB_SLACK for x in completion.logprobs):
        return "impossible_logprobs"
    if not (math.isfinite(reward.total) and math.isfinite(reward.accuracy)):
        return "reward_not_finite"
    return None


def screen(groups: Sequence[RolloutGroup], *, num_tokens: int) -> list[RolloutGroup]:
    """Mark rollouts that cannot be (`fault_of`) as failed, which leaves them out everywhere.

    The fault becomes a part `fault/<name>` of the reward.
    """
    return [
        replace(g, rollouts=tuple(_screened(r, num_tokens) for r in g.rollouts)) for g in groups
    ]


def _screened(rollout: Rollout, num_tokens: int) -> Rollout:
    fault = None if rollout.reward.is_failed else fault_of(rollout, num_tokens=num_tokens)
    if fault is None:
        return rollout
    parts = {**rollout.reward.parts, f"fault/{fault}": 1.0}
    failed = replace(rollout.reward, total=0.0, accuracy=0.0, parts=parts, is_failed=True)
    return replace(rollout, reward=failed)


def faults(groups: Sequence[RolloutGroup]) -> dict[str, int]:
    """How many rollouts failed, by cause; groups without any rollout count as `empty_group`."""
    found: Counter[str] = Counter()
    for group in groups:
        if not group.rollouts:
            found["empty_group"] += 1
        for rollout in group.rollouts:
            if rollout.reward.is_failed:
                found[_cause(rollout)] += 1
    return dict(found)


def _cause(rollout: Rollout) -> str:
    named = [name for name in rollout.reward.parts if name.startswith("fault/")]
    if named:
        return named[0].removeprefix("fault/")
    return next((n for n in rollout.reward.parts if n not in _GENERIC), "unknown")


_GENERIC = ("verifier_error", "infra_error")


def sample_informative(
    sample: Sampler,
    take: Callable[[int], list[Task]],
    config: DynamicSamplingConfig,
    *,
    wanted: int,
    seed: int,
) -> SampledBatch:
    """Sample groups until `wanted` have an accuracy strictly between 0 and 1 (dynamic sampling).

    At most `max_extra_batches` further batches are drawn; then the step goes on with the
    informative groups it has. If there are none, the batch says why.
    """
    everything: list[RolloutGroup] = []
    kept: list[RolloutGroup] = []
    num_batches = 1 + (config.max_extra_batches if config.enabled else 0)
    for attempt in range(num_batches):
        groups = sample(take(wanted), seed * num_batches + attempt)
        everything += groups
        kept += [g for g in groups if is_kept(g, config)]
        if len(kept) >= wanted:
            break
    reason = "" if kept else why_none(everything)
    return SampledBatch(kept=kept[:wanted], all=everything, reason=reason)


def why_none(groups: Sequence[RolloutGroup]) -> str:
    """Why no group of these can be trained on, and what to change."""
    found = faults(groups)
    rollouts = [r for g in groups for r in g.rollouts]
    if found and sum(found.values()) >= len(rollouts) / 2:
        causes = ", ".join(f"{name} {count}" for name, count in sorted(found.items()))
        return (
            f"no group could be scored: {sum(found.values())} of {len(rollouts)} completions "
            f"failed ({causes}). Failed rollouts are never scored 0, so there is nothing to learn "
            "from; mend the verifier of these tasks, or the worker that sampled them"
        )
    accuracy = np.mean([r.reward.accuracy for r in rollouts if not r.reward.is_failed] or [0.0])
    return (
        f"none of {len(groups)} sampled groups had completions both right and wrong (mean "
        f"accuracy {accuracy:.3f}), so there is nothing to learn from. Use easier or harder "
        "tasks, a larger rl.group_size, or more rl.dynamic_sampling.max_extra_batches"
    )
