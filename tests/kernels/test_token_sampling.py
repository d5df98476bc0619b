"""Sampling in one kernel against the definition, in Triton's interpreter or on a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from m1.inference.params import SamplingParams
from m1.inference.sampler import RowParams, sample
from m1_kernels.token_sampling import sample_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def both(logits, uniform, temperatures, num_tokens):
    rows = [SamplingParams(max_new_tokens=1, temperature=t) for t in temperatures]
    params = RowParams.of(rows)
    expected = sample(logits, uniform, params, num_tokens=num_tokens)
    given = torch.tensor(temperatures)
    moved = (logits.to(DEVICE), uniform.to(DEVICE), given.to(DEVICE))
    return expected, [x.cpu() for x in sample_tokens(*moved, num_tokens=num_tokens)]


def test_tokens_and_probabilities_equal_the_definition():
    generator = torch.Generator().manual_seed(1)
    temperatures = [1.0, 0.0, 0.5, 1.7, 1.0, 3.0]
    logits = 3 * torch.randn(6, 5000, generator=generator)
    uniform = torch.rand(6, dtype=torch.float64, generator=generator)
    expected, (tokens, logprobs, sampling, entropies) = both(logits, uniform, temperatures, 4900)
    assert tokens.tolist() == expected.tokens.tolist()
    torch.testing.assert_close(logprobs, expected.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(sampling, expected.sampling_logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies, expected.entropies, rtol=0, atol=1e-4)


def test_neither_end_of_the_distribution_is_passed():
    logits = torch.full((3, 2500), float("-inf"))
    logits[0, 7], logits[1, 2400], logits[2, 0] = 0.0, 1.0, 2.0
    logits[:, 2450:] = 50.0  # padding
    uniform = torch.tensor([0.0, 1 - 2**-53, 0.999], dtype=torch.float64)
    _, (tokens, _, sampling, _) = both(logits, uniform, [1.0, 0.7, 1.0], 2450)
    assert tokens.tolist() == [7, 2400, 0]
    torch.testing.assert_close(sampling, torch.zeros(3), rtol=0, atol=1e-6)


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform = (torch.arange(20, dtype=torch.float64) + 0.5) / 20
    logits = probabilities.log().expand(20, -1)
    _, (tokens, *_) = both(logits, uniform, [1.0] * 20, 4)
    assert torch.bincount(tokens, minlength=4).tolist() == [10, 0, 6, 4]
