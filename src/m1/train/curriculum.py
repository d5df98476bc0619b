"""Which tasks come when (paper sec. 4): sources with weights, and difficulty that rises.

`Curriculum.take` is a function of the recipe, the tasks and a small `CurriculumState`, which goes
into the checkpoint; a resumed run takes the tasks that an uninterrupted one would have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

from m1.config.schema import CurriculumConfig, CurriculumSourceConfig, WeightPoint
from m1.train.batches import row_order
from m1.types import M1Error, RolloutGroup, Task

EVERYTHING = ""
"""Name of the one source that stands for all tasks where the recipe names none."""


@dataclass
class LevelState:
    """Where a source with difficulty stands."""

    level: int
    num_groups: int = 0
    """Groups scored at this level since it was taken up or last judged."""
    accuracy_sum: float = 0.0
    """Sum of their mean accuracies."""
    owed: float = 0.0
    """Share of a task owed to easier levels."""
    num_rehearsed: int = 0
    """Tasks taken from easier levels."""


@dataclass
class CurriculumState:
    """All that the sampler remembers; JSON types after `asdict`."""

    step: int = 0
    """RL steps observed."""
    cursors: dict[str, int] = field(default_factory=dict)
    """Tasks taken, by pool: a source, or a source at a level."""
    credits: dict[str, float] = field(default_factory=dict)
    """Share of a task owed to each source."""
    pass_rates: dict[str, float] = field(default_factory=dict)
    """Running mean accuracy of each source that was observed."""
    levels: dict[str, LevelState] = field(default_factory=dict)
    """Of sources with difficulty."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """What `asdict` gave."""
        levels = {name: LevelState(**one) for name, one in value["levels"].items()}
        return cls(**{**value, "levels": levels})


class Curriculum:
    """The stream of RL tasks."""

    def __init__(self, tasks: Sequence[Task], config: CurriculumConfig, *, seed: int) -> None:
        """Sort the tasks into pools.

        Raises:
            M1Error: There are no tasks, a source has none, or its tasks lack a difficulty.
        """
        if not tasks:
            raise M1Error("there are no RL tasks; set num_rl in data.tasks")
        self._config, self._seed = config, seed
        self._sources = config.sources or (CurriculumSourceConfig(source=EVERYTHING),)
        self._pools = _pools(tasks, self._sources)
        self._levels = {s.source: _levels(s, self._pools) for s in self._sources if s.difficulty}
        self._orders: dict[str, tuple[int, np.ndarray]] = {}
        self._state = CurriculumState(
            levels={name: LevelState(found[0]) for name, found in self._levels.items()}
        )

    def take(self, count: int) -> list[Task]:
        """The next tasks.

        Sources take turns in proportion to their weights: each gains its share of a task, and the
        one that is owed most pays with one.
        """
        shares = self.shares()
        return [self._next(self._choose(shares)) for _ in range(count)]

    def observe(self, groups: Sequence[RolloutGroup]) -> None:
        """End a step: take in every group that it sampled, before any filter.

        Rollouts whose verifier failed are left out.
        """
        scored: dict[str, list[float]] = {}
        for group in groups:
            found = [r.reward.accuracy for r in group.rollouts if not r.reward.is_failed]
            if not found:
                continue
            accuracy = sum(found) / len(found)
            source = self._source_of(group.task)
            scored.setdefault(source, []).append(accuracy)
            self._count_at_level(source, group.task, accuracy)
        decay = self._config.pass_rate_decay
        for source, accuracies in scored.items():
            mean = sum(accuracies) / len(accuracies)
            past = self._state.pass_rates.get(source, mean)
            self._state.pass_rates[source] = decay * past + (1 - decay) * mean
        for name in self._levels:
            self._judge_level(name)
        self._state.step += 1

    def shares(self) -> dict[str, float]:
        """Share of tasks of each source at this step; they sum to 1.

        Raises:
            M1Error: All weights are 0 at this step.
        """
        weights = {s.source: self._weight(s) for s in self._sources}
        total = sum(weights.values())
        if total <= 0:
            raise M1Error(
                f"every weight in rl.curriculum.sources is 0 at step {self._state.step}, so there "
                "is nothing to sample; raise one from there on"
            )
        return {name: weight / total for name, weight in weights.items()}

    def metrics(self) -> dict[str, float]:
        """Shares, pass rates and levels of named sources."""
        named = {name: share for name, share in self.shares().items() if name != EVERYTHING}
        rates = self._state.pass_rates
        return {
            **{f"rl/source_share/{name}": share for name, share in named.items()},
            **{f"rl/source_accuracy/{n}": rates[n] for n in named if n in rates},
            **{f"rl/source_level/{n}": float(s.level) for n, s in self._state.levels.items()},
        }

    def state(self) -> dict[str, Any]:
        """For the checkpoint, JSON types."""
        return asdict(self._state)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self._state = CurriculumState.from_json(state)

    def _weight(self, source: CurriculumSourceConfig) -> float:
        weight = weight_at(source.weights, self._state.step)
        rate, config = self._state.pass_rates.get(source.source), self._config
        if rate is None or not config.pass_rate_strength:
            return weight
        factor = max(config.pass_rate_floor, 4 * rate * (1 - rate))
        return weight * float(factor**config.pass_rate_strength)

    def _choose(self, shares: Mapping[str, float]) -> str:
        owed = self._state.credits
        for name, share in shares.items():
            owed[name] = owed.get(name, 0.0) + share
        chosen = max((name for name, share in shares.items() if share > 0), key=owed.__getitem__)
        owed[chosen] -= 1.0
        return chosen

    def _next(self, source: str) -> Task:
        pool = self._pool(source)
        tasks = self._pools[pool]
        cursor = self._state.cursors.get(pool, 0)
        self._state.cursors[pool] = cursor + 1
        epoch, index = divmod(cursor, len(tasks))
        known = self._orders.get(pool)
        if known is None or known[0] != epoch:
            known = (epoch, row_order(len(tasks), seed=self._seed, epoch=epoch))
            self._orders[pool] = known
        return tasks[int(known[1][index])]

    def _pool(self, source: str) -> str:
        """The source itself, or its current level, or in turn one of those below."""
        state = self._state.levels.get(source)
        if state is None:
            return source
        easier = [level for level in self._levels[source] if level < state.level]
        difficulty = next(s.difficulty for s in self._sources if s.source == source)
        if easier and difficulty is not None:
            state.owed += difficulty.rehearsal_fraction
            if state.owed >= 1.0:
                state.owed -= 1.0
                state.num_rehearsed += 1
                return _pool_name(source, easier[state.num_rehearsed % len(easier)])
        return _pool_name(source, state.level)

    def _source_of(self, task: Task) -> str:
        return task.source if self._config.sources else EVERYTHING

    def _count_at_level(self, source: str, task: Task, accuracy: float) -> None:
        state = self._state.levels.get(source)
        if state is not None and task.difficulty == state.level:
            state.num_groups += 1
            state.accuracy_sum += accuracy

    def _judge_level(self, source: str) -> None:
        state, levels = self._state.levels[source], self._levels[source]
        difficulty = next(s.difficulty for s in self._sources if s.source == source)
        if difficulty is None or state.num_groups < difficulty.min_groups:
            return
        rate = state.accuracy_sum / state.num_groups
        place = levels.index(state.level)
        if rate >= difficulty.raise_at:
            place = min(place + 1, len(levels) - 1)
        elif rate < difficulty.lower_at:
            place = max(place - 1, 0)
        state.level, state.num_groups, state.accuracy_sum = levels[place], 0, 0.0


def weight_at(points: Sequence[WeightPoint], step: int) -> float:
    """Weight at a step: linear between points, constant before the first and after the last."""
    steps, weights = [p.step for p in points], [p.weight for p in points]
    return float(np.interp(step, steps, weights))


def _pools(
    tasks: Sequence[Task], sources: Sequence[CurriculumSourceConfig]
) -> dict[str, list[Task]]:
    pools: dict[str, list[Task]] = {}
    for source in sources:
        own = [t for t in tasks if source.source in (EVERYTHING, t.source)]
        if not own:
            raise M1Error(
                f"rl.curriculum.sources names {source.source!r}, but no RL task is from there; "
                "raise its num_rl in data.tasks, or loosen the filters of rl.lengths"
            )
        for task in own:
            if source.difficulty is None:
                pools.setdefault(source.source, []).append(task)
                continue
            if task.difficulty is None or task.difficulty != int(task.difficulty):
                raise M1Error(
                    f"rl.curriculum.sources wants levels of difficulty for {source.source!r}, but "
                    f"task {task.task_id} has difficulty {task.difficulty}; leave `difficulty` "
                    "out, or use a source with whole levels, such as logic:<task>"
                )
            pools.setdefault(_pool_name(source.source, int(task.difficulty)), []).append(task)
    return pools


def _levels(source: CurriculumSourceConfig, pools: Mapping[str, object]) -> list[int]:
    """Levels that have tasks, from the first that may be used up."""
    assert source.difficulty is not None
    prefix = _pool_name(source.source, "")
    found = sorted(int(n.removeprefix(prefix)) for n in pools if n.startswith(prefix))
    usable = [level for level in found if level >= source.difficulty.start]
    if not usable:
        raise M1Error(
            f"rl.curriculum.sources starts {source.source!r} at level {source.difficulty.start}, "
            f"but its tasks have levels {found}; lower difficulty.start"
        )
    return usable


def _pool_name(source: str, level: int | str) -> str:
    return f"{source} at level {level}"
