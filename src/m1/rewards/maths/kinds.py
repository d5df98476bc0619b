"""Answers of particular kinds: bases, times, percentages, options, quantities, ratios, words."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from m1.rewards.maths.numbers import parse_based, parse_number
from m1.rewards.maths.units import Unit, split_unit

Equal = Callable[[str, str], bool]
"""How parts of an answer are compared."""
_TIME = re.compile(
    r"(?P<hour>\d{1,2})(?::(?P<minute>\d{2}))?(?::(?P<second>\d{2}))?\s*(?P<half>[ap])\.?\s?m\.?"
    r"|(?P<hour2>\d{1,2}):(?P<minute2>\d{2})(?::(?P<second2>\d{2}))?",
    re.IGNORECASE,
)
_RATIO = re.compile(r"(.+?)\s*(?::|\bto\b|\\to\b)\s*(.+)")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")
_CHOICE = re.compile(r"\(?\s*([A-Ea-e])\s*\)?\.?")
_PERCENT = re.compile(r"(.+?)\s*(?:%|percent(?:age)?(?: points?)?|per cent)")


@dataclass(frozen=True)
class Comparison:
    """Whether two answers are equal, and what decided."""

    is_equal: bool
    reason: str


def bases(first: str, second: str) -> Comparison | None:
    """Numbers of a stated base: by value against other bases and plain numbers."""
    based = parse_based(first), parse_based(second)
    if based[0] and based[1]:
        same = int(*based[0]) == int(*based[1])
        return Comparison(same and based[0][1] == based[1][1], "base")
    if not (based[0] or based[1]):
        return None
    digits, base = based[0] or based[1] or ("0", 10)
    other = second if based[0] else first
    number = parse_number(other)
    if number is None:
        is_same = other.replace(" ", "").upper() == digits and not other.isdigit()
        return Comparison(is_same, "base")
    is_value = number.value == int(digits, base)
    # The base is often left away where the question names it.
    return Comparison(is_value or other.replace(" ", "") == digits, "base")


def times(first: str, second: str) -> Comparison | None:
    """Times of day, with or without am and pm."""
    times = _TIME.fullmatch(first), _TIME.fullmatch(second)
    if not (times[0] and times[1]):
        return None
    halves = [bool(match["half"]) for match in times if match]
    a, b = (_seconds(match) for match in times if match)
    if halves[0] != halves[1]:
        return Comparison(a % 43200 == b % 43200, "time")
    return Comparison(a == b, "time")


def _seconds(match: re.Match[str]) -> int:
    hour = int(match["hour"] or match["hour2"] or 0)
    minute = int(match["minute"] or match["minute2"] or 0)
    second = int(match["second"] or match["second2"] or 0)
    if match["half"]:
        hour = hour % 12 + (12 if match["half"].lower() == "p" else 0)
    return 3600 * hour + 60 * minute + second


def percents(first: str, second: str, equal: Equal) -> Comparison | None:
    """Percentages against percentages and plain numbers."""
    shares = _PERCENT.fullmatch(first), _PERCENT.fullmatch(second)
    if shares[0] and shares[1]:
        return Comparison(equal(shares[0][1], shares[1][1]), "percent")
    if not (shares[0] or shares[1]):
        return None
    share, other = (shares[0], second) if shares[0] else (shares[1], first)
    assert share
    a, b = parse_number(share[1]), parse_number(other)
    if a is None or b is None:
        return None if split_unit(other)[1] is None else Comparison(False, "percent")
    is_omitted = a.value == b.value and abs(a.value) >= 1
    return Comparison(is_omitted or a.value / 100 == b.value, "percent")


def choices(first: str, second: str) -> Comparison | None:
    """Letters of options, bracketed or not."""
    letters = _CHOICE.fullmatch(first), _CHOICE.fullmatch(second)
    if not (letters[0] and letters[1]):
        return None
    return Comparison(letters[0][1].lower() == letters[1][1].lower(), "choice")


def quantities(raw_first: str, raw_second: str, equal: Equal) -> Comparison | None:
    """Values with units; a unit may be left away, not exchanged."""
    (value_a, unit_a), (value_b, unit_b) = split_unit(raw_first), split_unit(raw_second)
    if unit_a is None and unit_b is None:
        return None
    if unit_a is not None and unit_b is not None:
        return _same_quantity(value_a, unit_a, value_b, unit_b, equal)
    unit, bare = (unit_a, value_b) if unit_a is not None else (unit_b, value_a)
    assert unit is not None
    if unit.dimensions == (("angle", 1),) and r"\pi" in bare:
        degrees = value_a if unit_a is not None else value_b
        return Comparison(equal(rf"\frac{{({degrees})\pi}}{{180}}", bare), "angle")
    if not unit.is_sure:
        return None
    return Comparison(equal(value_a, value_b), "unit_omitted")


def _same_quantity(
    value_a: str, unit_a: Unit, value_b: str, unit_b: Unit, equal: Equal
) -> Comparison:
    if unit_a.dimensions != unit_b.dimensions:
        return Comparison(False, "unit")
    if unit_a.factor == unit_b.factor:
        return Comparison(equal(value_a, value_b), "quantity")
    a, b = parse_number(value_a), parse_number(value_b)
    if a is None or b is None:
        return Comparison(False, "unit")
    return Comparison(a.value * unit_a.factor == b.value * unit_b.factor, "quantity")


def ratios(first: str, second: str, equal: Equal) -> Comparison | None:
    """`a:b` and `a to b` against each other and fractions."""
    a, b = _RATIO.fullmatch(first), _RATIO.fullmatch(second)
    if not (a or b):
        return None
    x = f"\\frac{{{a[1]}}}{{{a[2]}}}" if a else first
    y = f"\\frac{{{b[1]}}}{{{b[2]}}}" if b else second
    if ":" in x or ":" in y:
        return None
    return Comparison(equal(x, y), "ratio")


def words(first: str, second: str) -> Comparison | None:
    """Words, case and article aside."""
    if not (_WORDS.fullmatch(first) and _WORDS.fullmatch(second)):
        return None
    if len(first) < 2 or len(second) < 2:
        return Comparison(False, "text") if first.lower() == second.lower() else None
    a, b = (re.sub(r"^(?:the|a|an) ", "", text.lower()).strip() for text in (first, second))
    if a == b:
        return Comparison(True, "words")
    # Two words are no product of letters; single terms such as ab and ba may be.
    return Comparison(False, "words") if max(len(first), len(second)) > 3 else None
