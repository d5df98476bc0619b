"""What a token weighs: weights fixed on the whole batch, so the loss is a plain weighted sum.

Therefore it cannot depend on how the batch is cut into micro-batches, packed or spread over ranks.
Shapes: T_i tokens of completion i.
"""

from collections import Counter
from collections.abc import Sequence

import torch

AGGREGATIONS = ("token_mean", "prompt_mean", "sample_mean", "sample_token_mix")


def token_weights(
    aggregation: str,
    loss_masks: Sequence[torch.Tensor],
    prompts: Sequence[int],
    *,
    sample_share: float = 0.5,
) -> list[torch.Tensor]:
    """Weight of every token of a batch of completions; the weights of the batch sum to 1.

    With N completions of P prompts and n_i sampled tokens in completion i:

        token_mean         1 / sum_j n_j                 as most code reads Eq. 4
        prompt_mean        1 / (P * sum_{j of the prompt} n_j)       Eq. 4 read literally
        sample_mean        1 / (N * n_i)                 Eq. 1 and 3
        sample_token_mix   s * sample_mean + (1 - s) * token_mean

    The last is our reading of "combined sample-level loss and token-level normalization" (sec. 5),
    for which the paper gives no equation: long wrong completions weigh less than under a token
    mean, long right ones more than under a sample mean.

    Args:
        aggregation: One of these names.
        loss_masks: bool [T_i] for each completion.
        prompts: Prompt (group) of each completion.
        sample_share: s.

    Returns:
        float32 [T_i] for each completion, zero outside the mask.

    Raises:
        ValueError: The aggregation is not known.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(
            f"unknown aggregation {aggregation!r}; use one of {', '.join(AGGREGATIONS)}"
        )
    counts = [int(mask.sum()) for mask in loss_masks]
    shares = _shares(aggregation, counts, prompts, sample_share)
    return [mask.float() * share for mask, share in zip(loss_masks, shares, strict=True)]


def _shares(
    aggregation: str, counts: Sequence[int], prompts: Sequence[int], sample_share: float
) -> list[float]:
    """Weight of each token of every completion."""
    total = max(sum(counts), 1)
    if aggregation == "token_mean":
        return [1 / total] * len(counts)
    if aggregation == "prompt_mean":
        tokens: Counter[int] = Counter()
        for prompt, count in zip(prompts, counts, strict=True):
            tokens[prompt] += count
        return [1 / max(tokens[prompt] * len(tokens), 1) for prompt in prompts]
    size = len(counts)
    by_sample = [1 / (size * max(count, 1)) for count in counts]
    if aggregation == "sample_mean":
        return by_sample
    return [sample_share * share + (1 - sample_share) / total for share in by_sample]
