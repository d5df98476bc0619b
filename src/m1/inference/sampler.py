"""Choosing the next token, with a random stream of its own for every completion.

Shapes: B sequences, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from m1.inference.params import SamplingParams
from m1_kernels.host_decode import draw


@dataclass(frozen=True)
class SampledTokens:
    """One sampled token per sequence."""

    tokens: torch.Tensor
    """int64 [B]."""
    logprobs: torch.Tensor
    """float32 [B], natural log-probability before temperature and filters."""
    sampling_logprobs: torch.Tensor
    """float32 [B], the same of the distribution that was drawn from; 0 where greedy."""
    entropies: torch.Tensor
    """float32 [B], entropy in nats before temperature and filters."""
    top_tokens: torch.Tensor | None = None
    """int64 [B, n], most likely first."""
    top_logprobs: torch.Tensor | None = None
    """float32 [B, n], before temperature and filters."""

    def top_lists(self) -> list[tuple[tuple[int, float], ...]]:
        """Of each row the likeliest ids with their log-probabilities; none where nobody asked."""
        if self.top_tokens is None or self.top_logprobs is None:
            return []
        pairs = zip(self.top_tokens.tolist(), self.top_logprobs.tolist(), strict=True)
        return [tuple(zip(ids, values, strict=True)) for ids, values in pairs]


@dataclass(frozen=True)
class RowParams:
    """Sampling parameters of B rows as tensors; None where no row uses the parameter."""

    temperature: torch.Tensor | None
    """float32 [B, 1]."""
    greedy: torch.Tensor | None
    """bool [B]."""
    top_p: torch.Tensor | None
    """float32 [B, 1]."""
    top_k: torch.Tensor | None
    """int64 [B, 1]."""
    min_p: torch.Tensor | None
    """float32 [B, 1]."""
    top_logprobs: int

    @property
    def is_plain(self) -> bool:
        """Whether temperatures are all that rows ask for."""
        filters = (self.top_p, self.top_k, self.min_p)
        return not self.top_logprobs and all(column is None for column in filters)

    def temperatures(self, count: int, device: torch.device) -> torch.Tensor:
        """float32 [B], 0 where greedy."""
        found = torch.ones(count, device=device)
        if self.temperature is not None:
            found = self.temperature.squeeze(1)
        return found if self.greedy is None else found.masked_fill(self.greedy, 0.0)

    @classmethod
    def of(cls, rows: Sequence[SamplingParams], device: torch.device | str = "cpu") -> "RowParams":
        """Collect the parameters of every row."""

        def column(values: list[float], neutral: float) -> torch.Tensor | None:
            if all(value == neutral for value in values):
                return None
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        greedy = [row.temperature == 0 for row in rows]
        top_k = [row.top_k for row in rows]
        everything = 1 << 40
        return cls(
            temperature=column([row.temperature or 1.0 for row in rows], 1.0),
            greedy=torch.tensor(greedy, device=device) if any(greedy) else None,
            top_p=column([row.top_p for row in rows], 1.0),
            top_k=torch.tensor([k or everything for k in top_k], device=device)[:, None]
            if any(top_k)
            else None,
            min_p=column([row.min_p for row in rows], 0.0),
            top_logprobs=max((row.top_logprobs for row in rows), default=0),
        )


class RandomStream:
    """The random numbers of one completion: float64 in [0, 1), by the seed alone.

    A completion's tokens therefore do not depend on what else is in its batch.
    """

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.Philox(key=seed))
        self._drawn: list[float] = []

    def next(self) -> float:
        """The next number."""
        if not self._drawn:
            self._drawn = self._generator.random(64)[::-1].tolist()
        return self._drawn.pop()


def sample(
    logits: torch.Tensor, uniform: torch.Tensor, params: RowParams, *, num_tokens: int
) -> SampledTokens:
    """Sample by inverting the cumulative distribution.

    A token stays in the draw if it is among the top_k, if the mass before it in order of likelihood
    is below top_p, and if its probability is at least min_p times the largest, all of the
    distribution after temperature; what stays is renormalised.

    Args:
        logits: float32 [B, V].
        uniform: float64 [B] in [0, 1).
        params: Of each row.
        num_tokens: Only ids below it are tokens; the rest pads the embedding and is never chosen.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    likely = logprobs.exp()
    entropies = -(likely * logprobs).sum(-1)
    real = logits[:, :num_tokens]
    weights = likely[:, :num_tokens]
    if params.temperature is not None:
        warm = torch.softmax(real / params.temperature, dim=-1)
        # A row's bits must not depend on the temperatures of others.
        weights = torch.where(params.temperature == 1, weights, warm)
    weights = _filtered(weights, params)
    cumulative = weights.double().cumsum(-1)
    tokens = _invert(cumulative, uniform)
    drawn = weights.gather(1, tokens[:, None]).squeeze(1) / cumulative[:, -1]
    sampling = drawn.log().float()
    if params.greedy is not None:
        tokens = torch.where(params.greedy, real.argmax(-1), tokens)
        sampling = sampling.masked_fill(params.greedy, 0.0)
    top = logprobs[:, :num_tokens].topk(params.top_logprobs) if params.top_logprobs else None
    return SampledTokens(
        tokens=tokens,
        logprobs=logprobs.gather(1, tokens[:, None]).squeeze(1),
        sampling_logprobs=sampling,
        entropies=entropies,
        top_tokens=top.indices if top else None,
        top_logprobs=top.values if top else None,
    )


def sample_plain(
    logits: torch.Tensor, uniform: torch.Tensor, params: RowParams, *, num_tokens: int
) -> SampledTokens:
    """`sample` in one compiled function, for rows that are plain, on a CPU or a GPU."""
    temperatures = params.temperatures(logits.shape[0], logits.device)
    if not logits.is_cuda:
        return SampledTokens(*draw(logits, uniform, temperatures, num_tokens=num_tokens))
    from m1_kernels.token_sampling import sample_tokens

    return SampledTokens(*sample_tokens(logits, uniform, temperatures, num_tokens=num_tokens))


def _filtered(weights: torch.Tensor, params: RowParams) -> torch.Tensor:
    """Zero what top_k, top_p and min_p leave out."""
    if params.top_k is None and params.top_p is None and params.min_p is None:
        return weights
    ordered, index = weights.sort(dim=-1, descending=True, stable=True)
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if params.top_p is not None:
        before = ordered.cumsum(-1) - ordered
        within = before < params.top_p * ordered.sum(-1, keepdim=True)
        kept &= within | (params.top_p == 1)  # which rounding must not cut
    if params.top_k is not None:
        kept &= torch.arange(ordered.shape[1], device=ordered.device) < params.top_k
    if params.min_p is not None:
        kept &= ordered >= params.min_p * ordered[:, :1]
    kept[:, 0] = True
    return torch.zeros_like(weights).scatter(1, index, ordered * kept)


def _invert(cumulative: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    total = cumulative[:, -1:]
    # Below the total, so that rounding cannot push past the last token of positive weight.
    below = torch.nextafter(total, torch.zeros_like(total))
    threshold = torch.minimum(uniform.double()[:, None] * total, below)
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
