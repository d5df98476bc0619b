"""Group-relative advantages (paper Eq. 2)."""

from collections.abc import Sequence

import numpy as np

STD_EPSILON = 1e-6
"""A group whose rewards spread less than this carries no signal."""


def group_advantages(
    rewards: Sequence[float], is_failed: Sequence[bool] = (), *, scale: float | None = None
) -> list[float]:
    """A_i = (R_i - mean R) / std R over the completions of one prompt, population std.

    Failed rollouts (infrastructure faults) are left out of mean and std and get advantage 0. A
    group whose remaining rewards are all equal, or with fewer than two of them, gets zeros: there
    is nothing to prefer.

    Args:
        rewards: R_i of the group.
        is_failed: Marks failed rollouts; empty for none.
        scale: What to divide by in place of the group's own std.

    Returns:
        A_i of the group, in order.
    """
    failed = list(is_failed) or [False] * len(rewards)
    usable = np.array([r for r, f in zip(rewards, failed, strict=True) if not f], dtype=np.float64)
    if not np.isfinite(usable).all():
        raise ValueError(f"rewards must be finite, got {list(rewards)}")
    if usable.size < 2 or usable.std() < STD_EPSILON:
        return [0.0] * len(rewards)
    mean = usable.mean()
    divisor = usable.std() if scale is None else scale
    return [0.0 if f else float((r - mean) / divisor) for r, f in zip(rewards, failed, strict=True)]


def batch_advantages(
    groups: Sequence[tuple[Sequence[float], Sequence[bool]]], *, scale: str = "group_std"
) -> list[list[float]]:
    """Advantages of every group of a batch.

    Args:
        groups: Rewards and marks of failure of each.
        scale: `group_std` is Eq. 2; `batch_std` divides by the std of R - mean R over all that did
            not fail, so that groups of little spread are not blown up; `none` divides by 1.

    Returns:
        A_i of each group, in order.
    """
    if scale == "group_std":
        return [group_advantages(rewards, failed) for rewards, failed in groups]
    centred = [group_advantages(rewards, failed, scale=1.0) for rewards, failed in groups]
    if scale == "none":
        return centred
    pairs = zip(centred, groups, strict=True)
    counted = [a for row, (_, f) in pairs for a, x in zip(row, f, strict=True) if not x]
    std = float(np.std(counted)) if counted else 0.0
    return centred if std < STD_EPSILON else [[a / std for a in row] for row in centred]
