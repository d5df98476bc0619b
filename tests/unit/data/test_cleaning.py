from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m1.config.schema import CleaningConfig
from m1.data.cleaning import clean, drop_reason, normalise
from m1.data.sources import Document

CONFIG = CleaningConfig(
    min_characters=10, max_characters=100, max_mean_line_characters=20, min_alphabetic_fraction=0.5
)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("a\r\nb\rc\x85d\u2028e", "a\nb\nc\nd\ne"),
        ("e\u0301", "\u00e9"),
        ("a\x00\x0c\x1b\x7f\ufeffb\tc", "ab\tc"),
        ("a\ud800b", "ab"),
        ("\n\n  def f():\n    pass\n\n", "  def f():\n    pass"),
        ("x² + ½ ≤ ∑", "x² + ½ ≤ ∑"),
    ],
)
def test_normalise(raw, expected):
    assert normalise(raw) == expected


@given(st.text(st.characters(codec=None), max_size=200))
def test_normalise_is_idempotent_and_gives_valid_utf8(text):
    once = normalise(text)
    assert normalise(once) == once
    once.encode()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("abcdefghi", "too_short"),
        ("abcdefghij", None),
        ("abcdefgh\n" * 11 + "a", None),
        ("abcdefgh\n" * 11 + "ab", "too_long"),
        ("a" * 20, None),
        ("a" * 21, "long_lines"),
        ("aaaaa 11111", None),
        ("aaaaa 111111", "few_letters"),
        (" " * 15, "few_letters"),
        ("数学数学数学数学数学", None),
    ],
)
def test_each_rule_drops_just_beyond_its_bound(text, reason):
    assert drop_reason(text, CONFIG) == reason


def test_clean_counts_reasons_and_keeps_normalised_text():
    texts = ["short", "kept text\r\nhere", "1" * 15, "1" * 16]
    dropped = Counter()
    documents = [Document("s", str(number), text) for number, text in enumerate(texts)]
    kept = list(clean(documents, CONFIG, dropped=dropped))
    assert kept == [Document("s", "1", "kept text\nhere")]
    assert dropped == {"too_short": 1, "few_letters": 2}
