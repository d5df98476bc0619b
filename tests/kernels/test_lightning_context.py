"""Two context-parallel ranks, one at a time, against the recurrence over whole sequences.

The other rank's states come from the reference. Shapes: T tokens, H heads, D head dim.
"""

import pytest
import torch

pytest.importorskip("triton")

from m1_kernels.lightning_attention import chunk, reference
from m1_kernels.lightning_attention.context import entering_states
from m1_kernels.lightning_attention.context_kernels import ContextFunction

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5
SLOPES = (0.3, 1e-3)


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)


def rows_of(rank, chunks):
    """Tokens of a rank's chunks: of each sequence of 4 chunks numbers r and 3 - r."""
    rows, start = [], 0
    for length in chunks:
        for number in (rank, 3 - rank):
            rows += range(start + number * length, start + (number + 1) * length)
        start += 4 * length
    return rows


@pytest.mark.parametrize("is_cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_gives_its_part_of_the_whole(monkeypatch, rank, is_cut):
    if is_cut:
        monkeypatch.setattr(chunk, "SEGMENT_TOKENS", (8, 8))
        monkeypatch.setattr(chunk, "ENOUGH_PROGRAMS", 1 << 30)
    chunks, slopes = [10, 3], torch.tensor(SLOPES, device=DEVICE)
    total = 4 * sum(chunks)
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(total, 2, 16, generator=generator).to(DEVICE) for _ in range(4))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    wanted, _ = reference.recurrent(*exact, slopes, bounds([4 * n for n in chunks]))
    wanted.backward(d_out.double())

    pairs = [n for n in chunks for _ in range(2)]
    mine, theirs = rows_of(rank, chunks), rows_of(1 - rank, chunks)
    zeros = torch.zeros(len(pairs), 2, 16, 16, device=DEVICE, dtype=torch.float64).requires_grad_()
    other = [x[theirs].double() for x in (q, k, v)]
    out, states = reference.recurrent(*other, slopes, bounds(pairs), zeros)
    (adjoints,) = torch.autograd.grad(out, zeros, d_out[theirs].double())

    def exchange(own, backwards):
        both = [own, (adjoints if backwards else states).detach().float()]
        every = torch.stack(both if rank == 0 else both[::-1])
        return entering_states(every, slopes, bounds(pairs), rank=rank, backwards=backwards)

    given = [x[mine].requires_grad_() for x in (q, k, v)]
    found = ContextFunction.apply(*given, slopes, bounds(pairs), exchange)
    found.backward(d_out[mine])
    expected = [wanted, *(x.grad for x in exact)]
    for ours, whole in zip([found, *(x.grad for x in given)], expected, strict=True):
        error = (ours.detach().double() - whole[mine]).norm() / whole[mine].norm()
        assert error <= TOLERANCE
