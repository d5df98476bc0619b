"""Groups of completions with their rewards: from tasks to what the trainer learns from."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from m1.config.schema import RewardConfig, SamplingConfig
from m1.data.chat import render_prompt
from m1.data.tokenizer import Tokenizer
from m1.inference.engine import Engine, Request
from m1.rewards.length import overlong_penalty
from m1.rewards.registry import kind_of
from m1.rewards.rules import reward_of, score
from m1.rewards.service.pool import RewardService
from m1.types import Completion, Reward, Rollout, RolloutGroup, Task


def sample_groups(
    engine: Engine,
    tasks: Sequence[Task],
    *,
    tokenizer: Tokenizer,
    group_size: int,
    sampling: SamplingConfig,
    reward: RewardConfig,
    seed: int,
    service: RewardService | None = None,
) -> list[RolloutGroup]:
    """Sample `group_size` completions of every task and score them.

    With a service all verdicts come from its workers, whatever the verifier; without one they are
    made here, which `m1.rewards.rules.score` limits to safe verifiers. The random stream of a
    completion depends on `seed`, the task and its number in the group alone.
    """
    requests = requests_for(tasks, tokenizer=tokenizer, group_size=group_size, seed=seed)
    completions = engine.generate(requests, sampling)
    return score_groups(
        tasks,
        completions,
        tokenizer=tokenizer,
        reward=reward,
        max_tokens=sampling.max_new_tokens,
        service=service,
    )


def requests_for(
    tasks: Sequence[Task], *, tokenizer: Tokenizer, group_size: int, seed: int
) -> list[Request]:
    """What to ask of an engine for `group_size` completions of every task."""
    requests = []
    drawn: Counter[str] = Counter()
    for task in tasks:
        first = drawn[task.task_id] * group_size  # a task that comes twice is sampled anew
        drawn[task.task_id] += 1
        seeds = tuple(completion_seed(seed, task, first + i) for i in range(group_size))
        requests.append(Request(tuple(render_prompt(tokenizer, task.prompt)), seeds))
    return requests


def score_groups(
    tasks: Sequence[Task],
    completions: Sequence[Sequence[Completion]],
    *,
    tokenizer: Tokenizer,
    reward: RewardConfig,
    max_tokens: int,
    service: RewardService | None,
) -> list[RolloutGroup]:
    """Groups of completions with their rewards; `max_tokens` is the limit they were sampled to."""
    rewards = iter(_rewards(tasks, completions, tokenizer, reward, service))
    return [
        RolloutGroup(
            task=task,
            rollouts=tuple(
                Rollout(task, c, shaped(next(rewards), c, reward, max_tokens=max_tokens))
                for c in group
            ),
        )
        for task, group in zip(tasks, completions, strict=True)
    ]


def shaped(
    reward: Reward, completion: Completion, config: RewardConfig, *, max_tokens: int
) -> Reward:
    """The reward with the soft penalty of long completions, where the recipe has one.

    `accuracy`, which filters groups, stays as it is; the part is `overlong`.
    """
    if not config.overlong or config.overlong_tokens is None or reward.is_failed:
        return reward
    penalty = overlong_penalty(
        len(completion.tokens), max_tokens=max_tokens, cache_tokens=config.overlong_tokens
    )
    return replace(
        reward,
        total=reward.total + config.overlong * penalty,
        parts={**reward.parts, "overlong": penalty},
    )


def needs_service(tasks: Iterable[Task]) -> bool:
    """Whether a task's verifier must run in a process that can be killed."""
    return any(kind_of(task.verifier) not in ("logic", "reasoning_gym") for task in tasks)


def _rewards(
    tasks: Sequence[Task],
    completions: Sequence[Sequence[Completion]],
    tokenizer: Tokenizer,
    config: RewardConfig,
    service: RewardService | None,
) -> list[Reward]:
    """Rewards of all completions, group by group."""
    jobs = [
        (task, completion_text(tokenizer, completion))
        for task, group in zip(tasks, completions, strict=True)
        for completion in group
    ]
    if service is None:
        return [score(task, text, config) for task, text in jobs]
    judgements = service.judge_all(jobs)
    return [reward_of(j, text, config) for j, (_, text) in zip(judgements, jobs, strict=True)]


def completion_seed(seed: int, task: Task, index: int) -> int:
    """64-bit seed of one completion."""
    key = f"{seed}/{task.task_id}/{index}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little")


def completion_text(tokenizer: Tokenizer, completion: Completion) -> str:
    """Text of a completion without the end-of-turn token."""
    tokens = list(completion.tokens)
    if tokens and tokens[-1] == tokenizer.end:
        tokens.pop()
    return tokenizer.decode(tokens)
