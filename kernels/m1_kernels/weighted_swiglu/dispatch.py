"""The public entry point, which chooses an implementation by device."""

import torch

from m1_kernels.weighted_swiglu import reference


def weighted_swiglu(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """P SiLU(a) b for x = [a | b], with gradients of x and p.

    Args:
        x: [R, 2 F], any float dtype; arithmetic in float32.
        weights: p, [R, 1], float32 where the router's are.

    Returns:
        [R, F] in x's dtype.

    Raises:
        ValueError: The shapes do not fit.
    """
    if x.ndim != 2 or x.shape[1] % 2 or weights.shape != (x.shape[0], 1):
        raise ValueError(
            f"x has shape {list(x.shape)} and weights {list(weights.shape)}, but they must be "
            "[R, 2 F] and [R, 1]"
        )
    if not x.is_cuda:
        return reference.weighted_swiglu(x, weights)
    from m1_kernels.weighted_swiglu.kernel import WeightedSwigluFunction

    return WeightedSwigluFunction.apply(x, weights)  # type: ignore[no-any-return,no-untyped-call]
