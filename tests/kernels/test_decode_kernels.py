"""The kernels of a decoding step's feed-forward, in Triton's interpreter or on a GPU."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from m1_kernels.residual_norm import residual_norm
from m1_kernels.routed_experts import ExpertTable, reference, routed_experts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(tokens, hidden, width, experts, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    fc1 = [draw(2 * width, hidden) * hidden**-0.5 for _ in range(experts)]
    fc2 = [draw(hidden, width) * width**-0.5 for _ in range(experts)]
    return draw(tokens, hidden), draw(experts, hidden), fc1, fc2


@pytest.mark.parametrize(
    ("tokens", "hidden", "width", "experts", "top_k"),
    [(1, 64, 32, 4, 2), (7, 96, 80, 3, 2), (18, 40, 16, 2, 1), (5, 32, 16, 8, 3)],
)
def test_experts_equal_their_definition(tokens, hidden, width, experts, top_k):
    x, router, fc1, fc2 = drawn(tokens, hidden, width, experts)
    chosen = torch.full((tokens, top_k), -7, dtype=torch.int32, device=DEVICE)
    out = routed_experts(x, router, ExpertTable.of(fc1, fc2), top_k=top_k, chosen=chosen)
    expected = reference.routed_experts(x, router, fc1, fc2, top_k=top_k)
    assert (out.double() - expected).norm() <= 1e-5 * expected.norm()
    assert torch.equal(chosen.long(), (x.double() @ router.double().t()).topk(top_k).indices)


def test_experts_in_half_precision_are_as_near_as_their_rounding():
    # Triton's interpreter does not know bfloat16 behind an address.
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    x, router, fc1, fc2 = drawn(18, 64, 32, 4, dtype)
    out = routed_experts(x, router.float(), ExpertTable.of(fc1, fc2), top_k=2)
    expected = reference.routed_experts(x, router, fc1, fc2, top_k=2)
    assert (out.double() - expected).norm() <= 8e-3 * expected.norm()


def test_the_parts_of_two_ranks_add_up():
    x, router, fc1, fc2 = drawn(9, 32, 16, 6)
    parts = [
        routed_experts(
            x,
            router,
            ExpertTable.of(fc1[first : first + 3], fc2[first : first + 3], first_expert=first),
            top_k=2,
        )
        for first in (0, 3)
    ]
    expected = reference.routed_experts(x, router, fc1, fc2, top_k=2)
    assert (sum(parts).double() - expected).norm() <= 1e-5 * expected.norm()


def test_weights_of_several_shapes_are_refused():
    _, _, fc1, fc2 = drawn(1, 16, 16, 2)
    with pytest.raises(ValueError, match="fc1 has shapes"):
        ExpertTable.of([fc1[0], fc1[1][:4]], fc2)


@pytest.mark.parametrize("hidden", [16, 100])
def test_a_residual_and_its_norm_equal_the_definition(hidden):
    generator = torch.Generator().manual_seed(1)
    branch, residual = torch.randn(2, 5, hidden, generator=generator).to(DEVICE)
    weight = torch.rand(hidden, generator=generator).to(DEVICE)
    total, normed = residual_norm(branch, residual, weight, alpha=1.7, beta=0.5, eps=1e-5)
    expected = 1.7 * residual.double() + 0.5 * branch.double()
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
    expected = F.rms_norm(expected, (hidden,), weight.double(), 1e-5)
    torch.testing.assert_close(normed.double(), expected, rtol=1e-5, atol=1e-6)
