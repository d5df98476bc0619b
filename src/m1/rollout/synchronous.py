"""Rollouts that the trainer waits for."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from m1.config.schema import RlConfig
from m1.data.tokenizer import Tokenizer
from m1.inference.engine import Engine
from m1.rewards.service.pool import RewardService
from m1.rollout.filtering import SampledBatch, sample_informative, screen
from m1.rollout.groups import requests_for, score_groups
from m1.rollout.replicas import Replicas
from m1.rollout.swe import SWE, SweTasks, sample_episodes
from m1.rollout.tasks import TaskSource
from m1.types import RolloutGroup, Task

Phase = Callable[[str], None]
"""Told what begins."""


class SyncRollouts:
    """One batch of groups at a time, a function of the weights, the step and the task source."""

    def __init__(
        self,
        engine: Engine | None,
        tasks: TaskSource,
        config: RlConfig,
        *,
        tokenizer: Tokenizer,
        seed: int,
        service: RewardService | None,
        replicas: Replicas,
        phase: Phase,
        swe: SweTasks | None = None,
    ) -> None:
        """Sample with an engine.

        Args:
            engine: Absent on ranks for which the first one's engine samples.
            tasks: Where prompts come from.
            config: The RL table.
            tokenizer: Of the model.
            seed: The recipe's.
            service: For verifiers that need one.
            replicas: This rank's place.
            phase: Told when sampling and scoring begin.
            swe: What tasks of software engineering need, where some may come.
        """
        self._swe = swe
        self._engine, self._tasks, self._config = engine, tasks, config
        self._tokenizer, self._seed, self._service = tokenizer, seed, service
        self._replicas, self._phase = replicas, phase
        self._seconds = {"rl/generate_seconds": 0.0, "rl/reward_seconds": 0.0}

    def next(self, *, step: int) -> SampledBatch:
        """Groups for step `step` (from 0), sampled by the weights of now."""
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        batch = sample_informative(
            self._sample,
            self._tasks.take,
            self._config.dynamic_sampling,
            wanted=self._config.prompts_per_step,
            seed=self._seed * 1_000_003 + step,
        )
        return replace(batch, metrics=dict(self._seconds))

    def _sample(self, tasks: Sequence[Task], seed: int) -> list[RolloutGroup]:
        """Groups in the order of the tasks, whichever way each kind is sampled."""
        episodic = [task for task in tasks if task.verifier == SWE]
        plain = [task for task in tasks if task.verifier != SWE]
        found = {
            False: iter(self._complete(plain, seed) if plain else []),
            True: iter(self._play(episodic, seed) if episodic else []),
        }
        return [next(found[task.verifier == SWE]) for task in tasks]

    def _play(self, tasks: Sequence[Task], seed: int) -> list[RolloutGroup]:
        """Episodes, which sample and score by turns: their time counts as sampling."""
        assert self._engine is not None and self._swe is not None
        self._phase("sample")
        started = time.perf_counter()
        groups = sample_episodes(
            self._engine,
            tasks,
            self._swe,
            tokenizer=self._tokenizer,
            group_size=self._config.group_size,
            sampling=self._config.sampling,
            seed=seed,
        )
        self._seconds["rl/generate_seconds"] += time.perf_counter() - started
        return screen(groups, num_tokens=self._tokenizer.vocab_size)

    def _complete(self, tasks: Sequence[Task], seed: int) -> list[RolloutGroup]:
        config, replicas = self._config, self._replicas
        requests = requests_for(
            tasks, tokenizer=self._tokenizer, group_size=config.group_size, seed=seed
        )
        self._phase("sample")
        started = time.perf_counter()
        completions = (
            self._engine.generate(replicas.share(requests), config.sampling) if self._engine else []
        )
        sampled = time.perf_counter()
        self._phase("score")
        groups = []
        if replicas.is_first:
            groups = score_groups(
                replicas.share(tasks),
                completions,
                tokenizer=self._tokenizer,
                reward=config.reward,
                max_tokens=config.sampling.max_new_tokens,
                service=self._service,
            )
        found = replicas.gather(groups)
        self._seconds["rl/generate_seconds"] += sampled - started
        self._seconds["rl/reward_seconds"] += time.perf_counter() - sampled
        return screen(found, num_tokens=self._tokenizer.vocab_size)
