"""Groups of completions with their rewards: from tasks to what the trainer learns from."""

import hashlib
from collections import Counter
from collections.abc import Sequence

from m1.config.schema import RewardConfig, SamplingConfig
from m1.data.chat import render_prompt
from m1.data.tokenizer import Tokenizer
from m1.inference.engine import Engine, Request
from m1.rewards.rules import reward_of, score
from m1.rewards.service.pool import RewardService
from m1.rollout.sharing import shared
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
    completion depends on `seed`, the task and its number in the group alone. Over several ranks
    each copy of the model samples and scores its share of the tasks, and all ranks get all groups.
    """
    drawn: Counter[str] = Counter()
    jobs = []
    for task in tasks:
        first = drawn[task.task_id] * group_size  # a task that comes twice is sampled anew
        drawn[task.task_id] += 1
        seeds = tuple(completion_seed(seed, task, first + i) for i in range(group_size))
        jobs.append((task, Request(tuple(render_prompt(tokenizer, task.prompt)), seeds)))

    def make(share: Sequence[tuple[Task, Request]]) -> list[RolloutGroup]:
        own = [task for task, _ in share]
        completions = engine.generate([request for _, request in share], sampling)
        rewards = iter(_rewards(own, completions, tokenizer, reward, service))
        return [
            RolloutGroup(task=task, rollouts=tuple(Rollout(task, c, next(rewards)) for c in group))
            for task, group in zip(own, completions, strict=True)
        ]

    return shared(jobs, make)


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
