"""The activation of experts: its definition, its gradients, and what it refuses."""

import math

import pytest
import torch

from m1_kernels.weighted_swiglu import weighted_swiglu


def test_it_is_silu_of_the_first_half_times_the_second_times_the_weight():
    x = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    found = weighted_swiglu(x, torch.tensor([[0.5]]))
    sigmoid = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2))]
    expected = torch.tensor([[0.5 * 1 * sigmoid[0] * 3, 0.5 * -2 * sigmoid[1] * 4]])
    torch.testing.assert_close(found, expected)


def test_its_gradients_are_those_of_finite_differences():
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(weighted_swiglu, (x, weights))


@pytest.mark.parametrize(
    ("rows", "columns", "weights"), [(3, 5, (3, 1)), (3, 4, (3,)), (3, 4, (2, 1))]
)
def test_shapes_that_do_not_fit_are_refused(rows, columns, weights):
    with pytest.raises(ValueError, match=rf"x has shape \[{rows}, {columns}\] and weights"):
        weighted_swiglu(torch.zeros(rows, columns), torch.zeros(weights))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernel itself")
@pytest.mark.parametrize(("rows", "width"), [(1, 2048), (10, 96), (3, 1500), (0, 64)])
def test_the_interpreted_kernel_equals_the_definition(rows, width):
    pytest.importorskip("triton")
    from m1_kernels.weighted_swiglu import reference
    from m1_kernels.weighted_swiglu.kernel import WeightedSwigluFunction

    generator = torch.Generator().manual_seed(1)
    x, upstream = (torch.randn(rows, n, generator=generator) for n in (2 * width, width))
    weights = torch.rand(rows, 1, generator=generator)
    exact = [x.double().requires_grad_(), weights.double().requires_grad_()]
    wanted = [reference.weighted_swiglu(*exact)]
    wanted += torch.autograd.grad((wanted[0] * upstream).sum(), exact)
    ours = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    found = [WeightedSwigluFunction.apply(*ours)]
    found += torch.autograd.grad(found[0], ours, upstream)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        error = (one.detach().double() - other).norm() / other.norm().clamp(min=1e-30)
        assert error <= 1e-6, error
