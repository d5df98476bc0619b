"""Paged attention and the invariant product, in Triton's interpreter or on a GPU."""

import pytest
import torch

from m1.inference.attention import decode_softmax

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_rows_of_a_wider_page_table_are_read_as_they_lie():
    from m1_kernels.paged_attention import paged_attention_decode

    generator = torch.Generator().manual_seed(1)
    page, count = 4, 40
    lengths = torch.tensor([1, 9, 30])
    whole = torch.randperm(count - 1, generator=generator)[:36].view(3, 12)
    keys, values = torch.randn(2, count, page, 2, 16, generator=generator).unbind(0)
    q = torch.randn(3, 4, 16, generator=generator)
    expected = decode_softmax(q, keys, values, whole[:, :8], lengths)
    moved = [x.to(DEVICE) for x in (q, keys, values, whole, lengths)]
    pages = moved[3][:, :8]
    assert not pages.is_contiguous()
    out = paged_attention_decode(*moved[:3], pages, moved[4]).cpu()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_an_invariant_product_has_the_same_bits_for_any_number_of_rows():
    from m1_kernels.invariant_matmul import invariant_matmul

    x, w = torch.randn(35, 70, device=DEVICE), torch.randn(65, 70, device=DEVICE)
    whole = invariant_matmul(x, w)
    for rows in (1, 2, 33):
        assert torch.equal(invariant_matmul(x[:rows], w), whole[:rows])
    torch.testing.assert_close(whole, x @ w.t(), rtol=1e-4, atol=1e-4)
