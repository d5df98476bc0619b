"""Choosing the next token, with a random stream of its own for every completion.

Shapes: B sequences, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch

from m1.config.schema import SamplingConfig


@dataclass(frozen=True)
class SampledTokens:
    """One sampled token per sequence."""

    tokens: torch.Tensor
    """int64 [B]."""
    logprobs: torch.Tensor
    """float32 [B], natural log-probability before temperature and top-p."""
    entropies: torch.Tensor
    """float32 [B], entropy in nats before temperature and top-p."""


def uniforms(seed: int, count: int) -> np.ndarray:
    """The random numbers of one completion: float64 [count] in [0, 1), by the seed alone.

    A completion's tokens therefore do not depend on what else is in its batch.
    """
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def sample(
    logits: torch.Tensor, uniform: torch.Tensor, config: SamplingConfig, *, num_tokens: int
) -> SampledTokens:
    """Sample by inverting the cumulative distribution.

    Args:
        logits: float32 [B, V].
        uniform: float64 [B] in [0, 1).
        config: Temperature (0 is greedy) and top-p.
        num_tokens: Only ids below it are tokens; the rest pads the embedding and is never chosen.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    real = logits[:, :num_tokens]
    if config.temperature == 0:
        tokens = real.argmax(-1)
    else:
        probabilities = torch.softmax(real / config.temperature, dim=-1)
        if config.top_p < 1:
            probabilities = _nucleus(probabilities, config.top_p)
        tokens = _invert(probabilities, uniform)
    chosen = logprobs.gather(1, tokens[:, None]).squeeze(1)
    return SampledTokens(tokens=tokens, logprobs=chosen, entropies=entropies)


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all but the smallest set of most likely tokens whose mass reaches top_p."""
    ordered, index = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.where(before < top_p, ordered, 0.0)
    return torch.zeros_like(probabilities).scatter(1, index, kept)


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    cumulative = weights.double().cumsum(-1)
    threshold = uniform.double()[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
    # Rounding can only push past the end, never onto a token of weight zero inside.
    last = (weights.shape[1] - 1) - (weights > 0).flip(1).int().argmax(1)
    return torch.minimum(tokens, last)
