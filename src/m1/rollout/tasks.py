"""Where a rollout's task comes from."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from m1.types import M1Error, RolloutGroup, Task


class TaskSource(Protocol):
    """A stream of tasks whose state goes into the checkpoint."""

    def take(self, count: int) -> list[Task]:
        """The next tasks."""

    def observe(self, groups: Sequence[RolloutGroup]) -> None:
        """End a step: take in every group that it sampled, before any filter."""

    def metrics(self) -> dict[str, float]:
        """What to record of a step."""

    def state(self) -> dict[str, Any]:
        """For the checkpoint, JSON types."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state."""


class TaskStream:
    """Tasks in shuffled epochs; its whole state is how many were taken."""

    def __init__(self, tasks: Sequence[Task], *, seed: int) -> None:
        if not tasks:
            raise M1Error("there are no RL tasks; set num_rl in data.tasks")
        self._tasks, self._seed, self.cursor = tasks, seed, 0

    def take(self, count: int) -> list[Task]:
        """The next tasks."""
        size, end = len(self._tasks), self.cursor + count
        taken: list[Task] = []
        while self.cursor < end:
            epoch, index = divmod(self.cursor, size)
            order = np.random.default_rng((self._seed, epoch)).permutation(size)
            chosen = order[index : index + end - self.cursor]
            taken += [self._tasks[number] for number in chosen]
            self.cursor += len(chosen)
        return taken

    def observe(self, groups: Sequence[RolloutGroup]) -> None:
        """Nothing: the order does not depend on what came of the tasks."""

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}

    def state(self) -> dict[str, Any]:
        """How many tasks were taken."""
        return {"cursor": self.cursor}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue after as many tasks."""
        self.cursor = int(state["cursor"])
