"""The gated norm's kernels against its definition in float64, on one rank and on two."""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from m1_kernels.lightning_attention.gated_norm_kernels import GatedNormFunction

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-3


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE)


def definition(x, gate, weight, d_out):
    given = [t.double().requires_grad_() for t in (x, gate, weight)]
    out = torch.sigmoid(given[1]) * F.rms_norm(given[0], x.shape[-1:], given[2], EPS)
    return [out.detach(), *torch.autograd.grad(out, given, d_out.double())]


def run(tensors, d_out, *options):
    given = [t.clone().requires_grad_() for t in tensors]
    out = GatedNormFunction.apply(*given, EPS, *options)
    return [out.detach(), *torch.autograd.grad(out, given, d_out)]


@pytest.mark.parametrize(("rows", "width"), [(1, 32), (5, 24)])
def test_one_rank_equals_the_definition(monkeypatch, rows, width):
    monkeypatch.setattr("m1_kernels.lightning_attention.gated_norm_kernels._MAX_PROGRAMS", 2)
    x, gate, d_out = (draw(rows, width, seed=n) for n in range(3))
    weight = draw(width, seed=3)
    wanted = definition(x, gate, weight, d_out)
    for found, expected in zip(run((x, gate, weight), d_out), wanted, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_two_ranks_that_add_their_sums_equal_the_definition():
    rows, width = 5, 24
    x, gate, d_out = (draw(rows, 2 * width, seed=n) for n in range(3))
    weight = draw(2 * width, seed=3)
    wanted = definition(x, gate, weight, d_out)
    root = (x.square().mean(-1) + EPS).rsqrt()
    products = d_out * torch.sigmoid(gate) * weight * x * root[:, None]
    columns = (slice(0, width), slice(width, 2 * width))
    for mine, other in (columns, columns[::-1]):
        theirs = iter((x[:, other].square().sum(-1), products[:, other].sum(-1)))
        tensors = (x[:, mine], gate[:, mine], weight[mine])
        found = run(tensors, d_out[:, mine], 2, lambda sums, theirs=theirs: sums + next(theirs))
        assert next(theirs, None) is None  # one sum forward, one backward
        for one, whole in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.double(), whole[..., mine], rtol=1e-5, atol=1e-5)


def test_loading_the_kernels_does_not_hide_the_functions_of_the_package():
    import m1_kernels.lightning_attention as package

    assert all(not isinstance(getattr(package, name), ModuleType) for name in package.__all__)
