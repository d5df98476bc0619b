"""Shaping by length, apart from correctness: dynamic sampling must never see it."""


def overlong_penalty(num_tokens: int, *, max_tokens: int, cache_tokens: int) -> float:
    """DAPO's soft overlong penalty (arXiv 2503.14476, Eq. 13), kept by M1.

    0 up to L_max - L_cache, then linear: (L_max - L_cache - |y|) / L_cache, and -1 beyond L_max.

    Args:
        num_tokens: |y|, tokens of the completion.
        max_tokens: L_max, the longest completion that is sampled.
        cache_tokens: L_cache, the width of the linear part; at least 1, at most `max_tokens`.

    Returns:
        A value from -1 to 0, to be added to the reward.
    """
    if not 1 <= cache_tokens <= max_tokens:
        raise ValueError(
            f"cache_tokens is {cache_tokens}, but must lie in 1 to max_tokens ({max_tokens})"
        )
    over = num_tokens - (max_tokens - cache_tokens)
    return -min(1.0, max(0.0, over / cache_tokens))
