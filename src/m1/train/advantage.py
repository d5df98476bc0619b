"""Group-relative advantages (paper Eq. 2)."""

from collections.abc import Sequence

import numpy as np

STD_EPSILON = 1e-6
"""A group whose rewards spread less than this carries no signal."""


def group_advantages(rewards: Sequence[float], is_failed: Sequence[bool] = ()) -> list[float]:
    """A_i = (R_i - mean R) / std R over the completions of one prompt, population std.

    Failed rollouts (infrastructure faults) are left out of mean and std and get advantage 0. A
    group whose remaining
    rewards are all equal, or with fewer than two of them, gets zeros: there is nothing to prefer.

    Args:
        rewards: R_i of the group.
        is_failed: Marks failed rollouts; empty for none.

    Returns:
        A_i of the group, in order.
    """
    failed = list(is_failed) or [False] * len(rewards)
    usable = np.array([r for r, f in zip(rewards, failed, strict=True) if not f], dtype=np.float64)
    if not np.isfinite(usable).all():
        raise ValueError(f"rewards must be finite, got {list(rewards)}")
    if usable.size < 2 or usable.std() < STD_EPSILON:
        return [0.0] * len(rewards)
    mean, std = usable.mean(), usable.std()
    return [0.0 if f else float((r - mean) / std) for r, f in zip(rewards, failed, strict=True)]


def is_informative(accuracies: Sequence[float], is_failed: Sequence[bool] = ()) -> bool:
    """Whether a group's accuracy, never its shaped reward, lies strictly between 0 and 1."""
    failed = list(is_failed) or [False] * len(accuracies)
    usable = [a for a, f in zip(accuracies, failed, strict=True) if not f]
    return len(usable) >= 2 and 0.0 < sum(usable) / len(usable) < 1.0
