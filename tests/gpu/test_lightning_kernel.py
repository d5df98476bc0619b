"""The Triton kernels against the float64 recurrence: outputs, states, and every gradient."""

import pytest
import torch

from m1_kernels.lightning_attention import lightning_slopes, reference

# Measured on an H100: at most 3.0e-3 for bf16 and 2e-6 for fp32.
TOLERANCE = {torch.bfloat16: 3.5e-3, torch.float32: 1e-5}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("segment_tokens", [128, 1 << 20])
@pytest.mark.parametrize("layer", [0, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("lengths", "head_dim"), [([70, 1, 64, 300], 128), ([63, 2, 200], 64)])
def test_the_kernels_equal_the_recurrence(
    monkeypatch, lengths, head_dim, dtype, layer, segment_tokens
):
    from m1_kernels.lightning_attention import chunk

    monkeypatch.setattr(chunk, "SEGMENT_TOKENS", segment_tokens)
    heads, total = 4, sum(lengths)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    slopes = lightning_slopes(heads, layer_index=layer, num_layers=8)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    fused = draw(total, heads, 3, head_dim).to(dtype)  # strided, as the projection leaves them
    state = draw(len(lengths), heads, head_dim, head_dim)
    d_out, d_final = draw(total, heads, head_dim).to(dtype), draw(*state.shape)

    exact = [x.cuda().double().requires_grad_() for x in (*fused.unbind(2), state)]
    out, final = reference.recurrent(*exact[:3], slopes.cuda(), bounds, exact[3])
    ((out * d_out.cuda().double()).sum() + (final * d_final.cuda().double()).sum()).backward()
    wanted = [out, final, *(x.grad for x in exact)]

    q, k, v = (x.detach().requires_grad_() for x in fused.cuda().unbind(2))
    start = state.cuda().requires_grad_()
    out, final = chunk.lightning_attention_triton(
        q, k, v, slopes.cuda(), bounds.cuda(), initial_state=start, output_final_state=True
    )
    ((out.float() * d_out.cuda().float()).sum() + (final * d_final.cuda()).sum()).backward()
    found = [out, final, q.grad, k.grad, v.grad, start.grad]
    errors = [relative(a.detach(), b.detach()) for a, b in zip(found, wanted, strict=True)]
    assert max(errors) <= TOLERANCE[dtype], errors


def test_the_result_does_not_depend_on_the_run():
    from m1_kernels.lightning_attention import chunk

    q, k, v = (torch.randn(5000, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    slopes = lightning_slopes(2, layer_index=1, num_layers=8).cuda()
    bounds = torch.tensor([0, 4000, 5000], device="cuda")
    first = chunk.lightning_attention_triton(q, k, v, slopes, bounds)[0]
    assert all(
        torch.equal(first, chunk.lightning_attention_triton(q, k, v, slopes, bounds)[0])
        for _ in range(5)
    )
