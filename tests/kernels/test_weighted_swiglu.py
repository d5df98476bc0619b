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
