"""Which tasks a model neither always nor never solves (paper sec. 4.1: 0 < pass@10 < 0.9)."""

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from m1.curate.settings import PassRateConfig
from m1.rewards.service.pool import Judgement, content_key
from m1.types import Task

_BATCH_TASKS = 64


class Sampler(Protocol):
    """A model that answers."""

    def sample(self, tasks: Sequence[Task], num_samples: int) -> list[list[str]]:
        """`num_samples` completions of every task, fewer where the model cannot take it."""


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
    tasks: Sequence[Task],
    sampler: Sampler,
    judge: Judge,
    num_samples: int,
    *,
    known: MutableMapping[str, PassRate] | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> list[PassRate]:
    """Sample and grade every task, a batch of tasks at a time.

    Args:
        tasks: What to solve.
        sampler: Who solves.
        judge: Who grades.
        num_samples: Completions of each task.
        known: Rates by `content_key` that need no sampling; gets the new ones as they come.
        report: Hears of every batch.
    """
    rates: MutableMapping[str, PassRate] = {} if known is None else known
    keys = [content_key(task, "") for task in tasks]
    new = list({k: t for k, t in zip(keys, tasks, strict=True) if k not in rates}.items())
    for start in range(0, len(new), _BATCH_TASKS):
        batch = new[start : start + _BATCH_TASKS]
        completions = sampler.sample([task for _, task in batch], num_samples)
        pairs = zip(batch, completions, strict=True)
        jobs = [(task, text) for (_, task), texts in pairs for text in texts]
        judgements = judge.judge_all(jobs)
        for (key, _), texts in zip(batch, completions, strict=True):
            verdicts = [next(judgements).verdict for _ in texts]
            accuracies = [verdict.accuracy for verdict in verdicts if verdict is not None]
            rates[key] = PassRate(sum(a == 1 for a in accuracies), len(accuracies))
        report(f"pass rates of {start + len(batch)} of {len(new)} tasks")
    return [rates[key] for key in keys]


def decide(rate: PassRate, config: PassRateConfig) -> str | None:
    """Why a task is dropped, or None.

    With a confidence c a task stays while P(low < p < high | passes) >= c under the posterior
    Beta(passes + 1/2, failures + 1/2): then 9 of 10 passes do not prove p >= 0.9.
    """
    if rate.share is None:
        return "not_judged"
    if rate.num_passed == 0:
        return "never_solved"
    return outside(rate, config.low, config.high, config.confidence)


def outside(rate: PassRate, low: float, high: float, confidence: float) -> str | None:
    """`too_hard` or `too_easy` when a rate that was judged is not between bounds; else None."""
    if confidence == 0:
        share = rate.share or 0.0
        if share <= low:
            return "too_hard"
        return "too_easy" if share >= high else None
    below_low, below_high = _cumulative(rate, low), _cumulative(rate, high)
    if below_high - below_low >= confidence:
        return None
    return "too_easy" if 1 - below_high > below_low else "too_hard"


def _cumulative(rate: PassRate, share: float) -> float:
    from scipy.special import betainc

    failures = rate.num_judged - rate.num_passed
    return float(betainc(rate.num_passed + 0.5, failures + 0.5, share))
