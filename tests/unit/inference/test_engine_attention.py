"""Attention over the cache's table of states."""

import torch

from m1.inference.attention import decode_lightning, prefill_lightning
from m1.inference.steps import Chunk, Prompts
from m1_kernels.lightning_attention.reference import recurrent

SLOPES = torch.tensor([0.5, 0.0])


def inputs(count, *, heads=2, dim=4):
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(count, heads, dim, generator=generator) for _ in range(3)]


def test_rows_of_padding_write_no_state_and_give_zeros():
    q, k, v = inputs(4)
    table = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(9))
    before = table.clone()
    slots = torch.tensor([4, -1, 0, -1])
    out = decode_lightning(q, k, v, SLOPES, table, slots, batch_invariant=False)
    assert torch.equal(out[[1, 3]], torch.zeros(2, 2, 4))
    assert torch.equal(table[[1, 2, 3, 5]], before[[1, 2, 3, 5]])
    bounds = torch.tensor([0, 1, 2])
    expected, states = recurrent(q[[0, 2]], k[[0, 2]], v[[0, 2]], SLOPES, bounds, before[[4, 0]])
    torch.testing.assert_close(out[[0, 2]].double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(table[[4, 0]].double(), states, atol=1e-6, rtol=0)


def test_a_prompt_cut_into_chunks_goes_on_beside_one_that_begins_in_a_used_slot():
    q, k, v = inputs(50)
    table = torch.full((3, 2, 4, 4), torch.nan)  # what a slot held before must not matter
    whole, state = recurrent(q[:40], k[:40], v[:40], SLOPES, torch.tensor([0, 40]))
    fresh, other = recurrent(q[40:], k[40:], v[40:], SLOPES, torch.tensor([0, 10]))
    no_pages = torch.zeros(0, dtype=torch.int64)
    outs = []
    for rows, chunks in (
        (slice(0, 15), [Chunk(2, 0, 15, no_pages)]),
        (slice(15, 50), [Chunk(2, 15, 25, no_pages), Chunk(0, 0, 10, no_pages)]),
    ):
        prompts = Prompts.of(chunks, torch.device("cpu"))
        given = (x[rows] for x in (q, k, v))
        outs.append(prefill_lightning(*given, SLOPES, table, prompts, batch_invariant=False))
    expected = torch.cat((whole, fresh))
    torch.testing.assert_close(torch.cat(outs).double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(table[[2, 0]].double(), torch.cat((state, other)), atol=1e-5, rtol=0)
    assert table[1].isnan().all()
