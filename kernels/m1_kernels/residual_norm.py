"""A branch added to its residual, and the RMSNorm of the sum: one pass instead of eight, decoding.

Shapes: T tokens, h hidden.
"""

import torch
import triton
import triton.language as tl


def residual_norm(
    branch: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """X = alpha residual + beta branch, and x / sqrt(mean x^2 + eps) * weight, per row.

    Args:
        branch: [T, h], contiguous.
        residual: [T, h], of branch's dtype, contiguous.
        weight: [h], any float dtype.
        alpha: Scale of the residual.
        beta: Scale of the branch.
        eps: Of the norm.

    Returns:
        The sum, rounded to branch's dtype, and the norm of what was rounded, both [T, h].
    """
    num_tokens, hidden = branch.shape
    total, normed = torch.empty_like(branch), torch.empty_like(branch)
    if num_tokens:
        _kernel[(num_tokens,)](
            branch, residual, weight, total, normed, alpha, beta, eps,
            HIDDEN=hidden, BLOCK=triton.next_power_of_2(hidden),
            num_warps=4 if hidden <= 4096 else 8,
        )  # fmt: skip
    return total, normed


@triton.jit
def _kernel(
    branch, residual, weight, total, normed, alpha, beta, eps,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * HIDDEN
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    added = tl.load(branch + row + column, mask=inside, other=0.0).to(tl.float32)
    kept = tl.load(residual + row + column, mask=inside, other=0.0).to(tl.float32)
    value = (alpha * kept + beta * added).to(total.dtype.element_ty)
    tl.store(total + row + column, value, mask=inside)
    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / HIDDEN + eps)
    own = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row + column, (value * scale * own).to(normed.dtype.element_ty), mask=inside)
