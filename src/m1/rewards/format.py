"""The format reward: thinking and answer, each in its tags, exactly once and in order."""

import re

_FORMAT = re.compile(r"<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def extract_answer(text: str) -> str | None:
    """The answer of a well-formed completion; None when a tag is missing, repeated or misplaced."""
    match = _FORMAT.fullmatch(text.strip())
    if match is None or any(text.count(tag) != 1 for tag in _TAGS):
        return None
    return match["answer"].strip()


def is_well_formed(text: str) -> bool:
    """Whether a completion is thinking and answer and nothing else (paper sec. 4.1)."""
    return extract_answer(text) is not None
