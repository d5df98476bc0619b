"""What the loop asks of whoever samples."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from m1.config.schema import Recipe, RlConfig
from m1.data.tokenizer import Tokenizer
from m1.inference.engine import Engine
from m1.rewards.service.pool import RewardService
from m1.rollout.filtering import SampledBatch
from m1.rollout.replicas import Replicas
from m1.rollout.swe import SweTasks
from m1.rollout.synchronous import SyncRollouts
from m1.rollout.tasks import TaskSource
from m1.stage import StageContext
from m1.train.trainer import Trainer


class Rollouts:
    """Groups for the loop, and the version of the weights that sample them."""

    def __init__(
        self,
        take: Callable[[int, int], SampledBatch],
        load: Callable[[int], None],
        *,
        version: int,
        state: Callable[[], dict[str, Any]],
        stack: ExitStack,
    ) -> None:
        """Join the parts.

        Args:
            take: (step, policy version) -> groups.
            load: Hands the weights of now to whoever samples, as this version.
            version: Of the weights of now.
            state: What the checkpoint needs of them.
            stack: What to close.
        """
        self._take, self._load, self._state, self._stack = take, load, state, stack
        self.version = version

    def __enter__(self) -> Self:
        """These rollouts; whoever samples runs until the block ends."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End workers and services."""
        self._stack.close()

    def next(self, *, step: int) -> SampledBatch:
        """Groups for step `step`, from 0."""
        return self._take(step, self.version)

    def publish(self, num_updates: int) -> None:
        """The weights were changed by so many updates."""
        self.version += num_updates
        self._load(self.version)

    def state(self) -> dict[str, Any]:
        """For the checkpoint, JSON types."""
        return {"version": self.version, **self._state()}


@dataclass(frozen=True)
class Parts:
    """What sampling needs, wherever it happens."""

    context: StageContext
    recipe: Recipe
    config: RlConfig
    trainer: Trainer
    tokenizer: Tokenizer
    tasks: TaskSource
    service: RewardService | None
    replicas: Replicas
    phase: Callable[[str], None]
    swe: SweTasks | None = None
    """What tasks of software engineering need; None where there are none."""


def synchronous(parts: Parts, engine: Engine | None) -> SyncRollouts:
    """Rollouts of an engine, waited for; without one those of the first rank's."""
    return SyncRollouts(
        engine,
        parts.tasks,
        parts.config,
        tokenizer=parts.tokenizer,
        seed=parts.recipe.seed,
        service=parts.service,
        replicas=parts.replicas,
        phase=parts.phase,
        swe=parts.swe,
    )
