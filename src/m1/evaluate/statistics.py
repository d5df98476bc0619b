"""Means of k samples with confidence intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks and its confidence interval."""

    mean: float
    low: float
    high: float


def mean_with_interval(
    values: Sequence[float], *, confidence: float, num_bootstrap: int, seed: int
) -> Estimate:
    """Mean over tasks and a percentile-bootstrap interval that resamples tasks.

    Where every task has the same value a bootstrap would claim certainty; then the exact
    (Clopper-Pearson) interval of that many tasks is given instead.

    Args:
        values: One value in [0, 1] per task, the mean of its samples.
        confidence: Level, such as 0.95.
        num_bootstrap: Resamples.
        seed: Seed of the resampling.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ValueError("no values to average")
    mean = float(data.mean())
    if data.size > 1 and np.ptp(data) > 0:
        interval = stats.bootstrap(
            (data,),
            np.mean,
            confidence_level=confidence,
            n_resamples=num_bootstrap,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        return Estimate(mean, float(interval.low), float(interval.high))
    exact = stats.binomtest(round(mean * data.size), data.size).proportion_ci(confidence, "exact")
    return Estimate(mean, float(exact.low), float(exact.high))


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that one of k samples out of n is right: 1 - C(n-c, k) / C(n, k)."""
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(
            f"need 0 <= correct <= n and 1 <= k <= n, got {num_correct}, {num_samples}, {k}"
        )
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)
