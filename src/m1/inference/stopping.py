"""When a completion ends: stop tokens and strings, length, the paper's repetition stop."""

import math
from typing import Any

from m1.inference.sequences import Sequence


class StopText:
    """Text of a completion as it grows, searched for stop strings.

    Bytes that are not yet a whole character wait for the token that completes them.
    """

    def __init__(self, tokenizer: Any, stop_strings: tuple[str, ...]) -> None:
        """Follow one completion.

        Args:
            tokenizer: Has `decode_stream()`, whose `step(id)` gives new text or None.
            stop_strings: What to look for.
        """
        self._stream = tokenizer.decode_stream()
        self._stops = stop_strings
        self._reach = max(map(len, stop_strings), default=1) - 1
        self._tail = ""

    def found(self, token: int) -> str | None:
        """Add a token; returns the stop string that it completes."""
        text = self._stream.step(token)
        if not text:
            return None
        seen = self._tail + text
        for stop in self._stops:
            if stop in seen:
                return stop
        self._tail = seen[-self._reach :] if self._reach else ""
        return None


def reason_to_stop(sequence: Sequence, token: int, logprob: float) -> str | None:
    """Whether a sequence ends with the token it was just given."""
    params = sequence.params
    if token in params.stop_tokens:
        return "stop"
    if sequence.detokenizer is not None:
        sequence.stop_string = sequence.detokenizer.found(token)
        if sequence.stop_string is not None:
            return "stop"
    rule = params.repetition
    if math.exp(logprob) > rule.probability:
        sequence.streak += 1
        if sequence.streak >= rule.num_tokens:
            return "repetition"
    else:
        sequence.streak = 0
    return "length" if len(sequence.tokens) >= params.max_new_tokens else None
