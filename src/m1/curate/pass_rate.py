"""Which tasks a model neither always nor never solves (paper sec. 4.1: 0 < pass@10 < 0.9)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from m1.curate.settings import PassRateConfig
from m1.rewards.service.pool import Judgement
from m1.types import Task


class Sampler(Protocol):
    """A model that answers."""

    def sample(self, tasks: Sequence[Task], num_samples: int) -> list[list[str]]:
        """`num_samples` completions of every task."""


class Judge(Protocol):
    """Who grades; the reward service is one."""

    def judge_all(self, jobs: Iterable[tuple[Task, str]]) -> Iterator[Judgement]:
        """Judgements in the order of the jobs."""


@dataclass(frozen=True)
class PassRate:
    """How often a task was solved; failures of the infrastructure count as neither."""

    num_passed: int
    num_judged: int

    @property
    def share(self) -> float | None:
        """Observed pass rate."""
        return self.num_passed / self.num_judged if self.num_judged else None


def measure(
    tasks: Sequence[Task], sampler: Sampler, judge: Judge, num_samples: int
) -> list[PassRate]:
    """Sample and grade every task."""
    completions = sampler.sample(tasks, num_samples)
    jobs = [(t, text) for t, texts in zip(tasks, completions, strict=True) for text in texts]
    judgements = judge.judge_all(jobs)
    found = []
    for texts in completions:
        verdicts = [next(judgements).verdict for _ in texts]
        known = [verdict.accuracy for verdict in verdicts if verdict is not None]
        found.append(PassRate(sum(accuracy == 1 for accuracy in known), len(known)))
    return found


def decide(rate: PassRate, config: PassRateConfig) -> str | None:
    """Why a task is dropped, or None.

    With a confidence c a task stays while P(low < p < high | passes) >= c under the posterior
    Beta(passes + 1/2, failures + 1/2): then 9 of 10 passes do not prove p >= 0.9.
    """
    if rate.share is None:
        return "not_judged"
    if rate.num_passed == 0:
        return "never_solved"
    if config.confidence == 0:
        if rate.share <= config.low:
            return "too_hard"
        return "too_easy" if rate.share >= config.high else None
    below_low, below_high = _cumulative(rate, config.low), _cumulative(rate, config.high)
    if below_high - below_low >= config.confidence:
        return None
    return "too_easy" if 1 - below_high > below_low else "too_hard"


def _cumulative(rate: PassRate, share: float) -> float:
    from scipy.special import betainc

    failures = rate.num_judged - rate.num_passed
    return float(betainc(rate.num_passed + 0.5, failures + 0.5, share))
