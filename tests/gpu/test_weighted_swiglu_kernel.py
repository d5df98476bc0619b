"""The experts' activation in Triton against its definition in float64."""

import pytest
import torch

from m1_kernels.weighted_swiglu import reference, weighted_swiglu

# The rounding of the result: 2^-9 for bf16; sums of some thousand terms for fp32.
TOLERANCE = {torch.bfloat16: 3e-3, torch.float32: 1e-6}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(1, 2048), (1000, 96), (33, 1500), (0, 64)])
def test_the_kernel_equals_the_definition(rows, width, dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 2 * width, generator=generator).to(dtype)
    weights = torch.rand(rows, 1, generator=generator)
    upstream = torch.randn(rows, width, generator=generator).to(dtype)
    exact = [x.cuda().double().requires_grad_(), weights.cuda().double().requires_grad_()]
    wanted = [reference.weighted_swiglu(*exact)]
    wanted += torch.autograd.grad((wanted[0] * upstream.cuda().double()).sum(), exact)
    ours = [x.cuda().requires_grad_(), weights.cuda().requires_grad_()]
    found = [weighted_swiglu(*ours)]
    found += torch.autograd.grad(found[0], ours, upstream.cuda())
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        error = (one.detach().double() - other).norm() / other.norm().clamp(min=1e-30)
        assert error <= TOLERANCE[dtype], error
