"""Which difficulties of a logic task teach: neither beyond a model nor beneath it.

SynLogic sets each task's difficulty so that strong models solve it at least sometimes (pass@k > 0)
and a base model seldom but not never (pass rate between 0 and 0.5); the paper trains on such tasks
(sec. 4.1.1). Here both are measured: instances are drawn at every difficulty, models sampled, the
answers judged.
"""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, model_validator

from m1.config.base import Config, Fraction, PositiveInt, refuse
from m1.curate.pass_rate import Judge, PassRate, Sampler, measure, outside
from m1.curate.settings import AnswererConfig
from m1.data.logic.base import MAX_DIFFICULTY
from m1.data.logic.catalogue import LOGIC_TASKS, logic_task
from m1.types import M1Error, Task

Difficulty = Annotated[int, Field(ge=1, le=MAX_DIFFICULTY)]


class CalibrateConfig(Config):
    """What is measured, with which models, and what a useful difficulty is."""

    base: AnswererConfig | None = None
    """The model that is to be trained."""
    strong: AnswererConfig | None = None
    """A model that shows what can be solved at all; absent: that is not asked."""
    tasks: tuple[str, ...] = ()
    """Logic tasks; absent: all."""
    difficulties: Annotated[tuple[Difficulty, ...], Field(min_length=1)] = tuple(
        range(1, MAX_DIFFICULTY + 1)
    )
    """Difficulties to measure."""
    num_instances: PositiveInt = 20
    """Puzzles of each task and difficulty."""
    num_samples: PositiveInt = 10
    """Completions of each puzzle: the k of pass@k."""
    base_low: Fraction = 0.0
    """Exclusive lower bound of the base model's pass rate."""
    base_high: Fraction = 0.5
    """Exclusive upper bound of the base model's pass rate."""
    strong_low: Fraction = 0.0
    """Exclusive lower bound of the strong model's pass@k."""
    confidence: Fraction = 0.0
    """0: decide by observed rates. Else the probability that the base model's rate lies between its
    bounds (Beta posterior, Jeffreys prior, completions taken as independent) must be at least
    this."""
    num_rl: PositiveInt = 500
    """Tasks of each entry in the recipe fragment that is written."""
    seed: int = 1
    """Of the puzzles."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        unknown = sorted(set(self.tasks) - set(LOGIC_TASKS))
        if unknown:
            refuse([f"tasks names {unknown}, which are no logic tasks; known: {[*LOGIC_TASKS]}"])
        if self.base_low >= self.base_high:
            refuse([f"base_low is {self.base_low}, but must be below base_high; exchange them"])
        return self


@dataclass(frozen=True)
class Subject:
    """A model under test, and what is known of it already."""

    sampler: Sampler
    known: MutableMapping[str, PassRate] | None = None


@dataclass(frozen=True)
class Measured:
    """How a model did at one difficulty of one task."""

    passes: PassRate
    """Over all completions."""
    num_solved: int
    """Puzzles solved by at least one completion."""
    num_puzzles: int
    """Puzzles with at least one judged completion."""

    @property
    def pass_at_k(self) -> float | None:
        """Share of puzzles solved in `num_samples` completions."""
        return self.num_solved / self.num_puzzles if self.num_puzzles else None


@dataclass(frozen=True)
class Cell:
    """One difficulty of one task."""

    task: str
    difficulty: int
    base: Measured
    strong: Measured | None
    reason: str | None
    """Why it is not to be trained on; None when it is."""


def calibrate(
    config: CalibrateConfig,
    base: Subject,
    strong: Subject | None,
    judge: Judge,
    *,
    report: Callable[[str], None] = lambda _: None,
) -> list[Cell]:
    """Measure every task at every difficulty.

    Raises:
        M1Error: No completion of a model could be judged.
    """
    cells = []
    for name in config.tasks or LOGIC_TASKS:
        for difficulty in config.difficulties:
            puzzles = draw_puzzles(name, difficulty, config.num_instances, config.seed)
            found = _measure(puzzles, base, judge, config.num_samples)
            best = _measure(puzzles, strong, judge, config.num_samples) if strong else None
            reason = _reason(found, best, config)
            cells.append(Cell(name, difficulty, found, best, reason))
            report(f"{name} {difficulty}: {found.passes.share or 0.0:.2f}, {reason or 'useful'}")
    if not any(cell.base.passes.num_judged for cell in cells):
        raise M1Error(
            "no completion of the base model was judged: every prompt is longer than the model "
            "takes with sampling.max_new_tokens, or every judgement failed; lower that"
        )
    return cells


def draw_puzzles(name: str, difficulty: int, count: int, seed: int) -> list[Task]:
    """Puzzles that differ; the same arguments give the same ones.

    Raises:
        M1Error: The task has not so many at this difficulty.
    """
    task, found = logic_task(name), dict[str, Task]()
    for number in range(20 * count + 100):
        puzzle = task.generate(seed * 1_000_003 + number, difficulty)
        found.setdefault(puzzle.prompt, puzzle)
        if len(found) == count:
            return list(found.values())
    raise M1Error(
        f"logic task {name} gave {len(found)} different puzzles at difficulty {difficulty}, not "
        f"{count}; lower num_instances or leave the difficulty out"
    )


def useful(cells: Sequence[Cell]) -> dict[str, list[int]]:
    """Useful difficulties by task, also of tasks that have none."""
    table: dict[str, list[int]] = {cell.task: [] for cell in cells}
    for cell in cells:
        if cell.reason is None:
            table[cell.task].append(cell.difficulty)
    return table


def _measure(puzzles: Sequence[Task], subject: Subject, judge: Judge, num_samples: int) -> Measured:
    rates = measure(puzzles, subject.sampler, judge, num_samples, known=subject.known)
    judged = [rate for rate in rates if rate.num_judged]
    passes = PassRate(sum(r.num_passed for r in rates), sum(r.num_judged for r in rates))
    return Measured(passes, sum(rate.num_passed > 0 for rate in judged), len(judged))


def _reason(base: Measured, strong: Measured | None, config: CalibrateConfig) -> str | None:
    if base.passes.share is None or (strong is not None and strong.pass_at_k is None):
        return "not_judged"
    found = outside(base.passes, config.base_low, config.base_high, config.confidence)
    if found is not None:
        return f"{found}_for_base"
    if strong is not None and (strong.pass_at_k or 0.0) <= config.strong_low:
        return "too_hard_for_strong"
    return None
