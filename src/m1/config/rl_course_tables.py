"""Tables of what changes while RL goes on: length stages and their gate, curriculum, traces."""

from itertools import pairwise
from typing import Annotated, Self

from pydantic import Field, model_validator

from m1.config.base import (
    Config,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    refuse,
    repeated,
)

MAX_DIFFICULTY = 10
"""Hardest level of a generated task."""


class LengthStageConfig(Config):
    """One stage of longer thinking (paper sec. 5: 40K, then in steps to 80K output tokens).

    Absent values are those of `rl`.
    """

    max_new_tokens: PositiveInt
    """Length limit of a completion; names the stage: `rl_<max_new_tokens>`."""
    min_steps: PositiveInt
    """Steps before the gate may open."""
    max_steps: PositiveInt
    """Steps after which the stage ends though the gate has not opened; `rl.num_steps` is not
    used."""
    max_grad_norm: PositiveFloat | None = None
    """Gradient-norm clip; the paper lowers it with length."""
    clip_eps_high: PositiveFloat | None = None
    """Ceiling of the importance weight; the paper lowers it with length."""
    min_pass_rate: Fraction = 0.0
    """Tasks solved less often than this in earlier length stages are left out."""
    max_pass_rate: Fraction = 1.0
    """Tasks solved more often than this in earlier length stages are left out. Tasks that were
    never sampled are kept."""
    keep_fraction: dict[str, Fraction] = Field(default_factory=dict)
    """Share of a source's tasks to keep, by its name in `data.tasks`; the paper downsamples
    synthetic reasoning. Sources that are not named keep all."""

    @model_validator(mode="after")
    def _ranges_hold(self) -> Self:
        texts = []
        if self.max_steps < self.min_steps:
            texts.append(
                f"max_steps is {self.max_steps}, but min_steps is {self.min_steps}; raise max_steps"
            )
        if self.max_pass_rate < self.min_pass_rate:
            texts.append(
                f"max_pass_rate is {self.max_pass_rate}, but min_pass_rate is "
                f"{self.min_pass_rate}, so no task that was sampled stays; raise max_pass_rate"
            )
        refuse(texts)
        return self


class GateConfig(Config):
    """When a length stage ends (paper sec. 5): perplexity converged and lengths near the limit.

    Perplexity of a step: exp of the mean negative log-probability, under the policy that sampled
    them, of all tokens it generated. Converged: the medians of its logarithm over the last
    `window_steps` steps and over as many before them differ by at most `perplexity_tolerance`.
    Length: the median over the last `window_steps` steps of each step's 99th percentile of
    completion lengths is at least `length_fraction` of the limit. Medians, so that a spike of
    fewer than half a window's steps moves neither. A condition that holds is lost only at its
    release value (hysteresis), and both must hold for `hold_steps` steps in a row.
    """

    window_steps: Annotated[int, Field(ge=3)] = 20
    """Steps of a window; two are needed before anything holds."""
    perplexity_tolerance: PositiveFloat = 0.02
    """Largest difference of log-perplexity (nats) between the windows at which it converges."""
    perplexity_release: PositiveFloat = 0.04
    """Difference above which it no longer counts as converged."""
    length_fraction: Fraction = 0.9
    """Share of the limit that the 99th percentile must reach."""
    length_release: Fraction = 0.85
    """Share below which lengths no longer count as near the limit."""
    hold_steps: PositiveInt = 5
    """Steps in a row at which both conditions must hold."""

    @model_validator(mode="after")
    def _release_is_looser(self) -> Self:
        texts = []
        if self.perplexity_release < self.perplexity_tolerance:
            texts.append(
                f"perplexity_release is {self.perplexity_release}, but must not be below "
                f"perplexity_tolerance, {self.perplexity_tolerance}; raise it"
            )
        if self.length_release > self.length_fraction:
            texts.append(
                f"length_release is {self.length_release}, but must not exceed length_fraction, "
                f"{self.length_fraction}; lower it"
            )
        refuse(texts)
        return self


class WeightPoint(Config):
    """A source's weight at a step; between points it changes linearly, outside it is constant."""

    step: NonNegativeInt
    """RL step, from 0."""
    weight: NonNegativeFloat
    """Share of tasks, relative to the other sources' weights."""


class DifficultyConfig(Config):
    """Difficulty that rises with ability; the source's tasks need a `difficulty`."""

    start: Annotated[int, Field(ge=1, le=MAX_DIFFICULTY)] = 1
    """First level; absent levels are passed over."""
    raise_at: Fraction = 0.7
    """Pass rate at the current level from which the next one is taken up."""
    lower_at: Fraction = 0.1
    """Pass rate below which the level goes back."""
    min_groups: PositiveInt = 32
    """Groups scored at a level before it may change."""
    rehearsal_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of tasks from the levels below, in turn, against forgetting."""

    @model_validator(mode="after")
    def _band_is_open(self) -> Self:
        if self.lower_at >= self.raise_at:
            refuse(
                [
                    f"lower_at is {self.lower_at}, but must be below raise_at, {self.raise_at}, "
                    "or the level would never rest; lower it"
                ]
            )
        return self


class CurriculumSourceConfig(Config):
    """How often one source's tasks are taken."""

    source: str
    """Name of a `data.tasks` entry with num_rl > 0."""
    weights: Annotated[tuple[WeightPoint, ...], Field(min_length=1)] = (
        WeightPoint(step=0, weight=1.0),
    )
    """Weight over steps, by points in order of steps."""
    difficulty: DifficultyConfig | None = None
    """Levels; absent: all tasks alike."""

    @model_validator(mode="after")
    def _points_in_order(self) -> Self:
        for first, second in pairwise(self.weights):
            if second.step <= first.step:
                refuse(
                    [
                        f"weights has step {second.step} after step {first.step}; "
                        "write the points in order of steps, each step once"
                    ]
                )
        if not any(point.weight for point in self.weights):
            refuse(["weights are all 0, so the source would never be used; drop it or raise one"])
        return self


class CurriculumConfig(Config):
    """Which tasks come when (paper sec. 4: rule-verified first, general ones mixed in)."""

    sources: tuple[CurriculumSourceConfig, ...] = ()
    """Sources to draw from; those not named are not used. Empty: all tasks in one shuffled
    order."""
    pass_rate_strength: NonNegativeFloat = 0.0
    """Dynamic weights: a source's weight is multiplied by max(floor, 4p(1-p)) ** strength, p its
    mean accuracy; 0 turns it off."""
    pass_rate_floor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Floor of 4p(1-p), so that no source is lost for ever."""
    pass_rate_decay: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Weight of the past in the running mean of accuracy, a step."""

    @model_validator(mode="after")
    def _sources_differ(self) -> Self:
        texts = [
            f"sources has several entries for {name!r}; keep one"
            for name in repeated(source.source for source in self.sources)
        ]
        if self.sources and not any(s.weights[0].weight for s in self.sources):
            texts.append(
                "sources all have weight 0 at the first step, so there would be nothing to "
                "sample; raise one"
            )
        refuse(texts)
        return self


class TraceConfig(Config):
    """What is kept of rollouts."""

    every_steps: NonNegativeInt = 1
    """Steps between Parquet files of all rollouts; 0 keeps none."""
    mlflow_every_steps: NonNegativeInt = 10
    """Steps between samples shown as MLflow traces; 0 shows none."""
    mlflow_rollouts: PositiveInt = 4
    """Rollouts of such a sample."""


def length_mistakes(lengths: tuple[LengthStageConfig, ...]) -> list[str]:
    """What is wrong with a sequence of length stages."""
    return [
        f"lengths goes from {first.max_new_tokens} to {second.max_new_tokens} tokens, but each "
        "stage must allow more than the one before; raise max_new_tokens or drop the stage"
        for first, second in pairwise(lengths)
        if second.max_new_tokens <= first.max_new_tokens
    ]
