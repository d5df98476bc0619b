"""Rollouts of software engineering tasks: an agent's episodes, graded in fresh sandboxes."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from m1.config.schema import EpisodesConfig, Recipe, SamplingConfig
from m1.data.tokenizer import Tokenizer
from m1.inference.engine import Engine
from m1.rollout.agent import AgentConfig, Episode, first_prompt, run_episodes
from m1.rollout.dialogue import EnginePolicy, Trajectory
from m1.sandbox.base import Backend, SandboxError
from m1.sandbox.local import BubblewrapBackend
from m1.stage import StageContext
from m1.swe import stage
from m1.swe.grade import Grade, grade
from m1.swe.grade import reward as reward_of_grade
from m1.swe.instance import Instance
from m1.swe.store import EnvironmentStore
from m1.types import Completion, M1Error, Reward, Rollout, RolloutGroup, Task

SWE = "swe"
"""Source and verifier of these tasks; no verifier of `m1.rewards` has this name."""


@dataclass(frozen=True)
class SweTasks:
    """Instances, and where they can be worked on."""

    instances: Mapping[str, Instance]
    store: EnvironmentStore
    backend: Backend
    config: EpisodesConfig

    def tasks(self) -> list[Task]:
        """One task an instance, under its id."""
        return [
            Task(instance_id, SWE, first_prompt(instance), "", SWE, {"repo": instance.repo})
            for instance_id, instance in self.instances.items()
        ]


def handed_over(
    context: StageContext, recipe: Recipe, config: EpisodesConfig, *, is_heldout: bool
) -> SweTasks:
    """The sandbox stage's instances for RL, or those it keeps for evaluation.

    Raises:
        M1Error: There are none, or nothing can be isolated here.
    """
    assert recipe.sandbox is not None
    built = stage.load(context.path_of("sandbox"))
    num_heldout = recipe.sandbox.num_heldout
    found = split(built.instances, num_heldout=num_heldout)[is_heldout]
    if not found:
        raise M1Error(
            f"the sandbox stage made {len(built.instances)} instances, and sandbox.num_heldout "
            f"({num_heldout}) leaves none for {context.name}; add pairs of other packages"
        )
    try:
        backend = BubblewrapBackend()
    except SandboxError as error:
        raise M1Error(f"{error}; leave out episodes to run without") from None
    return SweTasks({i.instance_id: i for i in found}, built.store, backend, config)


def split(
    instances: Sequence[Instance], *, num_heldout: int
) -> tuple[list[Instance], list[Instance]]:
    """Those to learn from and those to be evaluated on: at least so many, by whole repositories.

    Which repositories are kept depends on their names alone.

    Raises:
        M1Error: There are fewer instances.
    """
    if num_heldout > len(instances):
        raise M1Error(
            f"sandbox.num_heldout is {num_heldout}, but the sandbox stage made {len(instances)} "
            "instances; lower it, or add pairs"
        )
    sizes = Counter(instance.repo for instance in instances)
    order = sorted(sizes, key=lambda repo: hashlib.sha256(repo.encode()).digest())
    kept: set[str] = set()
    while sum(sizes[repo] for repo in kept) < num_heldout:
        kept.add(order[len(kept)])
    return (
        [instance for instance in instances if instance.repo not in kept],
        [instance for instance in instances if instance.repo in kept],
    )


def sample_episodes(
    engine: Engine,
    tasks: Sequence[Task],
    given: SweTasks,
    *,
    tokenizer: Tokenizer,
    group_size: int,
    sampling: SamplingConfig,
    seed: int,
) -> list[RolloutGroup]:
    """`group_size` episodes of every task, all at once, each graded in a fresh sandbox.

    An episode or a grade that our side spoils is marked as failed, never scored zero.

    Raises:
        M1Error: A task is none of the instances.
    """
    config = given.config
    sampling = sampling.model_copy(update={"max_new_tokens": config.max_reply_tokens})
    policy = EnginePolicy(engine, tokenizer, sampling, seed=seed)
    instances = [_instance(task, given) for task in tasks for _ in range(group_size)]
    episodes = run_episodes(policy, instances, given.store, given.backend, _budgets(config))

    def score(pair: tuple[Instance, Episode]) -> Rollout:
        instance, episode = pair
        task = by_id[instance.instance_id]
        return Rollout(task, completion_of(episode), _reward(instance, episode, given))

    by_id = {task.task_id: task for task in tasks}
    with ThreadPoolExecutor(config.num_parallel) as threads:
        rollouts = list(threads.map(score, zip(instances, episodes, strict=True)))
    return [
        RolloutGroup(task, tuple(rollouts[number * group_size : (number + 1) * group_size]))
        for number, task in enumerate(tasks)
    ]


def reward_of(episode: Episode, found: Grade | None, config: EpisodesConfig) -> Reward:
    """The reward of a graded episode; failed where our side failed, in either.

    Parts: `resolved`, `f2p_rate`, `p2p_rate`, `turns`, `exploits` (signs found), and `exploit/KIND`
    for each kind of sign. With `deny_exploits` an episode with signs earns nothing: its accuracy is
    0 and its total at most 0.
    """
    cause = episode.infra_error or (found.infra_error if found is not None else "not graded")
    if cause or found is None:
        return Reward(0.0, 0.0, {"infra_error": 1.0, "swe/sandbox": 1.0}, is_failed=True)
    total = reward_of_grade(found, config.policy)
    assert total is not None
    accuracy = float(found.resolved)
    if episode.exploits and config.deny_exploits:
        total, accuracy = min(total, 0.0), 0.0
    parts = {
        "resolved": float(found.resolved),
        "f2p_rate": found.f2p_rate,
        "p2p_rate": found.p2p_rate,
        "turns": float(len(episode.turns)),
        "exploits": float(len(episode.exploits)),
        **{f"exploit/{sign.kind}": 1.0 for sign in episode.exploits},
    }
    return Reward(total, accuracy, parts)


def completion_of(episode: Episode) -> Completion:
    """An episode as one completion of its first prompt, masked where the environment speaks.

    `finish_reason` is `stop` for what was submitted, else `length`: a budget ended it.
    """
    found = episode.trajectory or Trajectory((), (), (), (), ())
    first = found.loss_mask.index(True) if True in found.loss_mask else len(found.tokens)
    return Completion(
        prompt_tokens=found.tokens[:first],
        tokens=found.tokens[first:],
        logprobs=found.logprobs[first:],
        entropies=found.entropies[first:],
        finish_reason="stop" if episode.stop_reason == "submitted" else "length",
        policy_versions=_filled(found.policy_versions[first:]),
        loss_mask=found.loss_mask[first:],
    )


def _reward(instance: Instance, episode: Episode, given: SweTasks) -> Reward:
    found = None
    if not episode.infra_error:
        seconds = given.config.test_seconds
        found = grade(instance, episode.patch, given.store, given.backend, test_seconds=seconds)
    return reward_of(episode, found, given.config)


def _instance(task: Task, given: SweTasks) -> Instance:
    if task.task_id not in given.instances:
        raise M1Error(
            f"task {task.task_id} is none of the sandbox stage's {len(given.instances)} instances; "
            "run that stage again"
        )
    return given.instances[task.task_id]


def _budgets(config: EpisodesConfig) -> AgentConfig:
    return AgentConfig(
        max_turns=config.max_turns,
        max_tokens=config.max_tokens,
        max_seconds=config.max_seconds,
        command_seconds=config.command_seconds,
        max_observation_characters=config.max_observation_characters,
        num_parallel=config.num_parallel,
    )


def _filled(versions: Sequence[int]) -> tuple[int, ...]:
    """Tokens of the environment count as of the version that sampled before them."""
    filled: list[int] = []
    for version in versions:
        filled.append(version if version >= 0 or not filled else filled[-1])
    return tuple(filled)
