"""The definition in plain torch."""

import torch
import torch.nn.functional as F


def weighted_swiglu(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """P SiLU(a) b for x = [a | b], in float32 or better.

    Args:
        x: [R, 2 F].
        weights: p, [R, 1].

    Returns:
        [R, F] in x's dtype.
    """
    kind = torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(kind).chunk(2, dim=-1)
    return (F.silu(a) * b * weights.to(kind)).to(x.dtype)
