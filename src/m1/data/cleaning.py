"""Heuristic cleaning with high recall for mathematics and code (MiniMax-M1, sec. 2.1).

Normalisation changes only how characters are encoded, never the layout: indentation and formulas
survive. Every dropped document has one named reason, the first rule that it breaks.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from m1.config.schema import CleaningConfig
from m1.data.sources import Document

_NEWLINES = re.compile("\r\n?|[\x85\u2028\u2029]")
# Control characters but tab and newline, byte order marks, and lone surrogates (UTF-8 has none).
_UNWANTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")
_LETTERS = re.compile(r"[^\W\d_]+")


def normalise(text: str) -> str:
    """`text` in NFC with Unix line ends, without control characters and outer blank lines."""
    text = _UNWANTED.sub("", _NEWLINES.sub("\n", text))
    return unicodedata.normalize("NFC", text).strip("\n")


def drop_reason(text: str, config: CleaningConfig) -> str | None:
    """Name of the first rule that normalised `text` breaks, or None to keep it."""
    if len(text) < config.min_characters:
        return "too_short"
    if len(text) > config.max_characters:
        return "too_long"
    if len(text) > config.max_mean_line_characters * (text.count("\n") + 1):
        return "long_lines"
    visible = sum(map(len, text.split()))
    letters = sum(map(len, _LETTERS.findall(text)))
    if letters < config.min_alphabetic_fraction * visible or not visible:
        return "few_letters"
    return None


def clean(
    documents: Iterable[Document], config: CleaningConfig, *, dropped: Counter[str]
) -> Iterator[Document]:
    """The documents that pass, normalised; reasons of the others are counted in `dropped`."""
    for document in documents:
        text = normalise(document.text)
        reason = drop_reason(text, config)
        if reason:
            dropped[reason] += 1
        else:
            yield replace(document, text=text)
