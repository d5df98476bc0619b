"""x w^T on a GPU with one fixed tiling, so that a row's bits do not depend on the other rows.

Vendor libraries choose tiles and splits of the inner dimension by the number of rows. Here every
output is the sum over K in the same order, whatever T is.

Shapes: T rows, K inputs, N outputs.
"""

import torch
import triton
import triton.language as tl

_ROWS, _COLUMNS, _INNER = 32, 64, 64


def invariant_matmul(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """X w^T with float32 sums.

    Args:
        x: [T, K].
        w: [N, K], of x's dtype.

    Returns:
        [T, N] in x's dtype.
    """
    num_rows, inner = x.shape
    num_columns = w.shape[0]
    x, w = x.contiguous(), w.contiguous()
    out = torch.empty(num_rows, num_columns, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(num_rows, _ROWS), triton.cdiv(num_columns, _COLUMNS))
    _kernel[grid](
        x, w, out, num_rows, num_columns, inner,
        ROWS=_ROWS, COLUMNS=_COLUMNS, INNER=_INNER,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    return out


@triton.jit
def _kernel(
    x, w, out, num_rows, num_columns, inner,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, inner, INNER):
        k = start + tl.arange(0, INNER)
        left = tl.load(
            x + rows[:, None].to(tl.int64) * inner + k[None, :],
            mask=(rows[:, None] < num_rows) & (k[None, :] < inner), other=0.0,
        )  # fmt: skip
        right = tl.load(
            w + columns[:, None].to(tl.int64) * inner + k[None, :],
            mask=(columns[:, None] < num_columns) & (k[None, :] < inner), other=0.0,
        )  # fmt: skip
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    where = rows[:, None].to(tl.int64) * num_columns + columns[None, :]
    is_inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    tl.store(out + where, total.to(out.dtype.element_ty), mask=is_inside)
