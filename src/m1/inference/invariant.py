"""Products whose bits do not depend on how many rows are multiplied together.

Matrix products choose their blocking by the number of rows, and with it the order of the sums. Here
every row is multiplied the same way whatever its batch (the mode of He et al., "Defeating
nondeterminism in LLM inference", 2025).

Shapes: T rows, K inputs, N outputs.
"""

import torch


def invariant_linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """X w^T, row by row.

    Args:
        x: [T, K].
        w: [N, K].

    Returns:
        [T, N].
    """
    if x.is_cuda:
        from m1_kernels.invariant_matmul import invariant_matmul

        product: torch.Tensor = invariant_matmul(x, w)
        return product
    return torch.bmm(x[:, None], w.t().expand(x.shape[0], -1, -1))[:, 0]
