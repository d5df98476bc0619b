"""The gate between lengths of thinking (paper sec. 5), as a pure function of recorded metrics.

Each step gives one `GateEvidence`; the gate's whole memory is a `GateState`, which goes into the
checkpoint. `GateConfig` defines what is measured and when each condition holds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal, Self

import numpy as np

from m1.config.schema import GateConfig, LengthStageConfig
from m1.types import Completion, RolloutGroup

PERCENTILE = 99


@dataclass(frozen=True)
class GateEvidence:
    """What one step says."""

    log_perplexity: float
    """Mean negative log-probability of the generated tokens, nats."""
    length_p99: float
    """99th percentile of completion lengths, tokens."""

    @classmethod
    def of(cls, completions: Sequence[Completion]) -> Self:
        """Evidence of a step's completions; NaN where none of them has a token."""
        lengths = [len(c.tokens) for c in completions]
        if not sum(lengths):
            return cls(math.nan, math.nan)
        total = sum(sum(c.logprobs) for c in completions)
        return cls(-total / sum(lengths), float(np.percentile(lengths, PERCENTILE)))


@dataclass(frozen=True)
class GateState:
    """All that the gate remembers."""

    step: int = 0
    """Steps seen."""
    recent: tuple[GateEvidence, ...] = ()
    """Evidence of the last two windows, oldest first."""
    is_converged: bool = False
    is_near_limit: bool = False
    num_held: int = 0
    """Steps in a row at which both conditions held."""

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """What `to_json` gave."""
        recent = tuple(GateEvidence(**one) for one in value["recent"])
        return cls(**{**value, "recent": recent})


@dataclass(frozen=True)
class GateDecision:
    """What the gate says after a step, and why."""

    verdict: Literal["stay", "open", "out_of_steps"]
    """`open`: both conditions held long enough; `out_of_steps`: the stage ends without that."""
    step: int
    perplexity: float | None
    """exp of the newer window's median log-perplexity; None while windows are not full."""
    log_perplexity_change: float | None
    """Newer window's median minus the older one's, nats."""
    length_p99: float | None
    """Median over the newer window, tokens."""
    is_converged: bool
    is_near_limit: bool
    num_held: int

    @property
    def ends_stage(self) -> bool:
        """Whether this step is the stage's last."""
        return self.verdict != "stay"

    def metrics(self) -> dict[str, float]:
        """For the log, with the evidence as far as there is any."""
        found = {
            "rl/gate_perplexity": self.perplexity,
            "rl/gate_log_perplexity_change_nats": self.log_perplexity_change,
            "rl/gate_length_p99_tokens": self.length_p99,
            "rl/gate_is_converged": float(self.is_converged),
            "rl/gate_is_near_limit": float(self.is_near_limit),
            "rl/gate_held_steps": float(self.num_held),
            "rl/gate_is_open": float(self.verdict == "open"),
        }
        return {name: value for name, value in found.items() if value is not None}


def advance(
    state: GateState, evidence: GateEvidence, config: GateConfig, length: LengthStageConfig
) -> tuple[GateState, GateDecision]:
    """Take in one step's evidence and decide.

    A step whose numbers are not finite stays in its window and makes the condition it is about
    fail while it is there.
    """
    recent = (*state.recent, evidence)[-2 * config.window_steps :]
    older, newer = recent[: -config.window_steps], recent[-config.window_steps :]
    is_full = len(recent) == 2 * config.window_steps
    change = perplexity = p99 = None
    if is_full:
        level = _median([one.log_perplexity for one in newer])
        change = level - _median([one.log_perplexity for one in older])
        perplexity = math.exp(level) if level < 700 else math.inf
        p99 = _median([one.length_p99 for one in newer])
    is_converged = _holds(
        None if change is None else -abs(change),
        enter=-config.perplexity_tolerance,
        leave=-config.perplexity_release,
        held=state.is_converged,
    )
    is_near = _holds(
        p99,
        enter=config.length_fraction * length.max_new_tokens,
        leave=config.length_release * length.max_new_tokens,
        held=state.is_near_limit,
    )
    new = GateState(
        step=state.step + 1,
        recent=recent,
        is_converged=is_converged,
        is_near_limit=is_near,
        num_held=state.num_held + 1 if is_converged and is_near else 0,
    )
    verdict: Literal["stay", "open", "out_of_steps"] = "stay"
    if new.num_held >= config.hold_steps and new.step >= length.min_steps:
        verdict = "open"
    elif new.step >= length.max_steps:
        verdict = "out_of_steps"
    return new, GateDecision(
        verdict, new.step, perplexity, change, p99, is_converged, is_near, new.num_held
    )


def _holds(value: float | None, *, enter: float, leave: float, held: bool) -> bool:
    """A condition with hysteresis: entered at `enter`, left below `leave`, false without number."""
    if value is None or not math.isfinite(value):
        return False
    return value >= (leave if held else enter)


def _median(values: Sequence[float]) -> float:
    """The median; NaN if any value is not finite."""
    return median(values) if all(map(math.isfinite, values)) else math.nan


class LengthGate:
    """The gate of one stage as the loop holds it; without a length it never ends the stage.

    `step` after each RL step, `state` into every checkpoint, `restore` after a resume; the stage
    goes on until `is_done`.
    """

    def __init__(self, config: GateConfig, length: LengthStageConfig | None) -> None:
        self._config, self._length = config, length
        self._state = GateState()
        self.last: GateDecision | None = None

    @property
    def is_done(self) -> bool:
        """Whether the stage is over."""
        return self.last is not None and self.last.ends_stage

    def step(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Take in all groups that a step sampled; gives metrics with decision and evidence.

        Failed rollouts are left out.
        """
        if self._length is None:
            return {}
        scored = [r for g in groups for r in g.rollouts if not r.reward.is_failed]
        evidence = GateEvidence.of([r.completion for r in scored])
        self._state, self.last = advance(self._state, evidence, self._config, self._length)
        return self.last.metrics()

    def facts(self) -> dict[str, Any]:
        """The last decision, for the stage's pointer."""
        return {"gate": asdict(self.last)} if self.last is not None else {}

    def state(self) -> dict[str, Any]:
        """For the checkpoint, JSON types."""
        return self._state.to_json()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state. Checkpoints are written while the gate is closed."""
        self._state, self.last = GateState.from_json(state), None
