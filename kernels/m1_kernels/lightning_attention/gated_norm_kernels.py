"""sigmoid(gate) * RMSNorm(x) * weight, what follows lightning attention, as one pass each way.

    y = s(g) w x r,  r = (mean(x^2) + eps)^(-1/2)
    dx = r (h - x r^2 mean(h x)),  h = dy s(g) w;   dg = dy w x r s(g) (1 - s(g));
    dw = sum over rows of dy s(g) x r

Where tensor-parallel ranks share a row's columns, both means are over all of them: each rank sums
its own, the sums are added over the ranks, and a second pass takes the total. Each way that is one
number a row between ranks, and one more reading of the inputs.

Shapes: T rows, W columns (all heads of this rank).
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

_MAX_PROGRAMS = 1024


@triton.jit
def _squares_kernel(x, squares, W: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x_r = tl.load(x + row * W + column, mask=column < W, other=0.0).to(tl.float32)
    tl.store(squares + row, tl.sum(x_r * x_r))


@triton.jit
def _forward_kernel(
    x, gate, weight, squares, y, root, eps,
    W: tl.constexpr, ALL_W: tl.constexpr, BLOCK: tl.constexpr, IS_SHARED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < W
    x_r = tl.load(x + row * W + column, mask=inside, other=0.0).to(tl.float32)
    g_r = tl.load(gate + row * W + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if IS_SHARED:
        total = tl.load(squares + row)
    else:
        total = tl.sum(x_r * x_r)
    r = tl.rsqrt(total / ALL_W + eps)
    y_r = tl.sigmoid(g_r) * x_r * r * w
    tl.store(y + row * W + column, y_r.to(y.dtype.element_ty), mask=inside)
    tl.store(root + row, r)


@triton.jit
def _backward_kernel(
    x, gate, weight, root, dy, dx, dgate, dweight, products, num_rows, rows_each,
    W: tl.constexpr, BLOCK: tl.constexpr, IS_SHARED: tl.constexpr,
):  # fmt: skip
    """All gradients, or with `IS_SHARED` the row's sums of h x r in place of dx."""
    column = tl.arange(0, BLOCK)
    inside = column < W
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64) * rows_each
    for number in range(0, rows_each):
        row = first + number
        at = row * W + column
        here = inside & (row < num_rows)
        x_r = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        s = tl.sigmoid(tl.load(gate + at, mask=here, other=0.0).to(tl.float32))
        dy_r = tl.load(dy + at, mask=here, other=0.0).to(tl.float32)
        r = tl.load(root + row, mask=row < num_rows, other=0.0)
        normed = x_r * r
        dw += dy_r * s * normed
        dg_r = dy_r * w * normed * s * (1 - s)
        tl.store(dgate + at, dg_r.to(dgate.dtype.element_ty), mask=here)
        h = dy_r * s * w
        product = tl.sum(h * normed)
        if IS_SHARED:
            tl.store(products + row, product, mask=row < num_rows)
        else:
            dx_r = r * (h - normed * (product / W))
            tl.store(dx + at, dx_r.to(dx.dtype.element_ty), mask=here)
    tl.store(dweight + tl.program_id(0) * W + column, dw, mask=inside)


@triton.jit
def _shared_dx_kernel(
    x, gate, weight, root, dy, products, dx,
    W: tl.constexpr, ALL_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < W
    at = row * W + column
    x_r = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32))
    dy_r = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(root + row)
    dx_r = r * (dy_r * s * w - x_r * r * (tl.load(products + row) / ALL_W))
    tl.store(dx + at, dx_r.to(dx.dtype.element_ty), mask=inside)


class GatedNormFunction(torch.autograd.Function):
    """Autograd of the kernels; `add` sums float32 [T] over `num_ranks`, or is None for one rank."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: torch.Tensor,
        gate: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        num_ranks: int = 1,
        add: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        x, gate = x.contiguous(), gate.contiguous()
        num_rows, width = x.shape
        y = torch.empty_like(x)
        root = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        sizes = {"W": width, "BLOCK": triton.next_power_of_2(width)}
        squares = root
        if add is not None:
            squares = torch.empty_like(root)
            _squares_kernel[(num_rows,)](x, squares, **sizes)
            squares = add(squares)
        _forward_kernel[(num_rows,)](
            x, gate, weight, squares, y, root, eps,
            ALL_W=width * num_ranks, IS_SHARED=add is not None, **sizes,
        )  # fmt: skip
        ctx.save_for_backward(x, gate, weight, root)
        ctx.num_ranks, ctx.add = num_ranks, add
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        x, gate, weight, root = ctx.saved_tensors
        num_rows, width = x.shape
        rows_each = triton.cdiv(num_rows, _MAX_PROGRAMS)
        programs = triton.cdiv(num_rows, rows_each)
        dy, dx, dgate = grads[0].contiguous(), torch.empty_like(x), torch.empty_like(gate)
        dweight = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        sizes = {"W": width, "BLOCK": triton.next_power_of_2(width)}
        products = torch.empty_like(root)
        _backward_kernel[(programs,)](
            x, gate, weight, root, dy, dx, dgate, dweight, products, num_rows, rows_each,
            IS_SHARED=ctx.add is not None, **sizes,
        )  # fmt: skip
        if ctx.add is not None:
            _shared_dx_kernel[(num_rows,)](
                x, gate, weight, root, dy, ctx.add(products), dx,
                ALL_W=width * ctx.num_ranks, **sizes,
            )  # fmt: skip
        return dx, dgate, dweight.sum(0).to(weight.dtype), None, None, None
