"""p SiLU(a) b in Triton, one program a row; its gradient reads x and dy once.

With s = sigmoid(a):  da = p dy b s (1 + a (1 - s)),  db = p dy a s,  dp = sum over F of dy a s b.

Shapes: R rows, F columns.
"""

from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _forward_kernel(x, weights, y, F: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    p = tl.load(weights + row).to(tl.float32)
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < F
        a = tl.load(x + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
        out = p * a * tl.sigmoid(a) * b
        tl.store(y + row * F + column, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(x, weights, dy, dx, dweights, F: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    p = tl.load(weights + row).to(tl.float32)
    dp = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < F
        a = tl.load(x + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + row * F + column, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(a)
        dp += g * a * s * b
        da = p * g * b * s * (1 + a * (1 - s))
        db = p * g * a * s
        tl.store(dx + row * 2 * F + column, da.to(dx.dtype.element_ty), mask=inside)
        tl.store(dx + row * 2 * F + F + column, db.to(dx.dtype.element_ty), mask=inside)
    tl.store(dweights + row, tl.sum(dp).to(dweights.dtype.element_ty))


class WeightedSwigluFunction(torch.autograd.Function):
    """Autograd of the two kernels."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:  # noqa: D102
        x, weights = x.contiguous(), weights.contiguous()
        num_rows, width = x.shape[0], x.shape[1] // 2
        y = x.new_empty(num_rows, width)
        if num_rows:
            _forward_kernel[(num_rows,)](x, weights, y, F=width, BLOCK=_BLOCK)
        ctx.save_for_backward(x, weights)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: D102
        x, weights = ctx.saved_tensors
        num_rows, width = x.shape[0], x.shape[1] // 2
        dx, dweights = torch.empty_like(x), torch.empty_like(weights)
        if num_rows:
            _backward_kernel[(num_rows,)](
                x, weights, grads[0].contiguous(), dx, dweights, F=width, BLOCK=_BLOCK
            )
        return dx, dweights
