"""sigmoid(gate) * RMSNorm(x) * weight, what follows lightning attention, as one pass each way.

    y = s(g) w x r,  r = (mean(x^2) + eps)^(-1/2)
    dx = r (h - x r^2 mean(h x)),  h = dy s(g) w;   dg = dy w x r s(g) (1 - s(g));
    dw = sum over rows of dy s(g) x r

Shapes: T rows, W columns (all heads).
"""

from typing import Any

import torch
import triton
import triton.language as tl

_MAX_PROGRAMS = 1024


@triton.jit
def _forward_kernel(x, gate, weight, y, root, eps, W: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < W
    x_r = tl.load(x + row * W + column, mask=inside, other=0.0).to(tl.float32)
    g_r = tl.load(gate + row * W + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x_r * x_r) / W + eps)
    y_r = tl.sigmoid(g_r) * x_r * r * w
    tl.store(y + row * W + column, y_r.to(y.dtype.element_ty), mask=inside)
    tl.store(root + row, r)


@triton.jit
def _backward_kernel(
    x, gate, weight, root, dy, dx, dgate, dweight, num_rows, rows_each,
    W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
        dx_r = r * (h - normed * (tl.sum(h * normed) / W))
        tl.store(dx + at, dx_r.to(dx.dtype.element_ty), mask=here)
    tl.store(dweight + tl.program_id(0) * W + column, dw, mask=inside)


class GatedNormFunction(torch.autograd.Function):
    """Autograd of the two kernels."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        x, gate = x.contiguous(), gate.contiguous()
        num_rows, width = x.shape
        y = torch.empty_like(x)
        root = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(width)
        _forward_kernel[(num_rows,)](x, gate, weight, y, root, eps, W=width, BLOCK=block)
        ctx.save_for_backward(x, gate, weight, root)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        x, gate, weight, root = ctx.saved_tensors
        num_rows, width = x.shape
        rows_each = triton.cdiv(num_rows, _MAX_PROGRAMS)
        programs = triton.cdiv(num_rows, rows_each)
        dx, dgate = torch.empty_like(x), torch.empty_like(gate)
        dweight = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        _backward_kernel[(programs,)](
            x, gate, weight, root, grads[0].contiguous(), dx, dgate, dweight, num_rows, rows_each,
            W=width, BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
        return dx, dgate, dweight.sum(0).to(weight.dtype), None
