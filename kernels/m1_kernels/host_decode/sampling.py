"""The next tokens of a batch, by `sample.c`.

Shapes: B rows, V vocabulary.
"""

import ctypes
from typing import NamedTuple

import torch

from m1_kernels.host_decode.shared_library import library

_BLOCK = 64


class Drawn(NamedTuple):
    """One token of every row; natural logarithms."""

    tokens: torch.Tensor
    """int64 [B]."""
    logprobs: torch.Tensor
    """float32 [B], at temperature 1, over all V ids."""
    sampling_logprobs: torch.Tensor
    """float32 [B], at the row's temperature, over the ids that may be drawn; 0 where greedy."""
    entropies: torch.Tensor
    """float32 [B], at temperature 1, over all V ids."""


def draw(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: torch.Tensor, *, num_tokens: int
) -> Drawn:
    """Invert the cumulative distribution of every row.

    Args:
        logits: float32 [B, V] on the CPU, the last dimension dense.
        uniform: float64 [B] in [0, 1).
        temperature: float32 [B]; 0 takes the likeliest.
        num_tokens: Only ids below it are drawn.

    Raises:
        OSError: There is no compiled library here.
    """
    found = library()
    if found is None:
        raise OSError("there is no compiled sampler; see shared_library.py")
    count, vocab = logits.shape
    made = Drawn(torch.empty(count, dtype=torch.int64), *torch.empty(3, count).unbind())
    sums = torch.empty(vocab // _BLOCK + 1, dtype=torch.float64)
    sizes = map(ctypes.c_int64, (count, logits.stride(0), vocab, num_tokens))
    tensors = (temperature.contiguous(), uniform.contiguous(), sums, *made)
    places = (ctypes.c_void_p(x.data_ptr()) for x in tensors)
    found.m1_sample(ctypes.c_void_p(logits.data_ptr()), *sizes, *places)
    return made
