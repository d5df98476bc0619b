"""Whether two answers are the same: from text, over types, to expressions."""

import re
from dataclasses import dataclass
from fractions import Fraction

from m1.rewards.maths import symbolic
from m1.rewards.maths.intervals import Piece, names_a_set, parse_set, split_top
from m1.rewards.maths.normal import compact, nesting, normalize
from m1.rewards.maths.numbers import Number, parse_based, parse_number, same_number
from m1.rewards.maths.symbolic import Unreadable
from m1.rewards.maths.units import Unit, split_unit

_MAX_NESTING = 60
_MAX_ITEMS = 40
_ASSIGNMENT = re.compile(
    r"^\s*(?P<name>[A-Za-z](?:_\{?\w+\}?)?|\\(?:theta|alpha|beta|lambda)|"
    r"[A-Za-z]{1,2}'?\s*\([A-Za-z0-9, ]+\))"
    r"\s*(?:=|\\in|\\approx|\\equiv|:)\s*(?P<value>[^=<>]+)$"
)
_NAMED_TUPLE = re.compile(r"^\([A-Za-z]\w?(?:, ?[A-Za-z]\w?)+\)\s*=\s*(?=\()")
_TIME = re.compile(
    r"(?P<hour>\d{1,2})(?::(?P<minute>\d{2}))?(?::(?P<second>\d{2}))?\s*(?P<half>[ap])\.?\s?m\.?"
    r"|(?P<hour2>\d{1,2}):(?P<minute2>\d{2})(?::(?P<second2>\d{2}))?",
    re.IGNORECASE,
)
_RATIO = re.compile(r"(.+?)\s*(?::|\bto\b|\\to\b)\s*(.+)")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")
_CHOICE = re.compile(r"\(?\s*([A-Ea-e])\s*\)?\.?")
_MATRIX = re.compile(r"\\begin\{(?:[pbBvV]?matrix|array)\}(?:\{[lcr|]+\})?(.*?)\\end\{[A-Za-z]+\}")
_MODULUS = re.compile(r"\\(?:bmod|pmod|mod)|\bmod\b")
_PERCENT = re.compile(r"(.+?)\s*(?:%|percent(?:age)?(?: points?)?|per cent)")


@dataclass(frozen=True)
class Comparison:
    """Whether two answers are equal, and what decided."""

    is_equal: bool
    reason: str


def compare(reference: str, answer: str) -> Comparison:
    """Compare a model's answer with the reference; neither is trusted to be short or sane."""
    if max(nesting(reference), nesting(answer)) > _MAX_NESTING:
        return Comparison(reference.strip() == answer.strip(), "too_nested")
    first, second = normalize(reference), normalize(answer)
    if compact(first) == compact(second) and first:
        return Comparison(True, "equal_text")
    if not second:
        return Comparison(False, "empty")
    if _MODULUS.search(second) and not _MODULUS.search(first):
        return Comparison(False, "unevaluated_remainder")
    return _compare_typed(reference, answer, first, second)


def _compare_typed(raw_first: str, raw_second: str, first: str, second: str) -> Comparison:
    numbers = parse_number(first), parse_number(second)
    if numbers[0] and numbers[1] and not _has_separator_conflict(first, second):
        return Comparison(same_number(numbers[0], numbers[1]), "number")
    for check in (_bases, _times, _percents, _choices, _matrices, _sets, _lists, _assignments):
        found = check(first, second)
        if found is not None:
            return found
    found = _quantities(raw_first, raw_second)
    if found is not None:
        return found
    return _ratios(first, second) or _words(first, second) or _expressions(first, second)


def _equal(first: str, second: str) -> bool:
    return compare(first, second).is_equal


def _has_separator_conflict(first: str, second: str) -> bool:
    """`1,234` against `1, 234`: one is a number, the other may be two."""
    return any(", " in text for text in (first, second))


def _bases(first: str, second: str) -> Comparison | None:
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


def _times(first: str, second: str) -> Comparison | None:
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


def _percents(first: str, second: str) -> Comparison | None:
    shares = _PERCENT.fullmatch(first), _PERCENT.fullmatch(second)
    if shares[0] and shares[1]:
        return Comparison(_equal(shares[0][1], shares[1][1]), "percent")
    if not (shares[0] or shares[1]):
        return None
    share, other = (shares[0], second) if shares[0] else (shares[1], first)
    assert share
    a, b = parse_number(share[1]), parse_number(other)
    if a is None or b is None:
        return None if split_unit(other)[1] is None else Comparison(False, "percent")
    is_omitted = a.value == b.value and abs(a.value) >= 1
    return Comparison(is_omitted or a.value / 100 == b.value, "percent")


def _choices(first: str, second: str) -> Comparison | None:
    letters = _CHOICE.fullmatch(first), _CHOICE.fullmatch(second)
    if not (letters[0] and letters[1]):
        return None
    return Comparison(letters[0][1].lower() == letters[1][1].lower(), "choice")


def _matrices(first: str, second: str) -> Comparison | None:
    found = _MATRIX.fullmatch(first), _MATRIX.fullmatch(second)
    if not (found[0] or found[1]):
        return None
    grids = [_rows(m[1]) if m else _vector(t) for m, t in zip(found, (first, second), strict=True)]
    a, b = grids
    if a is None or b is None:
        return Comparison(False, "matrix")
    if [len(row) for row in a] != [len(row) for row in b]:
        return Comparison(False, "matrix")
    pairs = [pair for x, y in zip(a, b, strict=True) for pair in zip(x, y, strict=True)]
    return Comparison(len(pairs) <= _MAX_ITEMS and all(_equal(x, y) for x, y in pairs), "matrix")


def _rows(text: str) -> list[list[str]]:
    rows = [row for row in text.split(r"\\") if row.strip()]
    return [[cell.strip() for cell in row.split("&")] for row in rows]


def _vector(text: str) -> list[list[str]] | None:
    """A tuple as a column; nested lists as rows."""
    match = re.fullmatch(r"\((.+)\)|\[(.+)\]|\\langle(.+)\\rangle", text)
    if match is None:
        return None
    items = split_top(next(group for group in match.groups() if group), ",")
    rows = [re.fullmatch(r"\[(.+)\]", item) for item in items]
    if all(rows):
        return [split_top(row[1], ",") for row in rows if row]
    return [[item] for item in items]


def _sets(first: str, second: str) -> Comparison | None:
    if not (names_a_set(first) or names_a_set(second)):
        return None
    a, b = parse_set(first), parse_set(second)
    if a is None or b is None:
        return None
    return Comparison(_same_pieces(a, b), "set")


def _same_pieces(a: list[Piece], b: list[Piece]) -> bool:
    if len(a) != len(b) or len(a) > _MAX_ITEMS:
        return False
    try:
        pairs = list(zip(sorted(a, key=_low), sorted(b, key=_low), strict=True))
    except Unreadable:
        pairs = list(zip(a, b, strict=True))
    return all(
        (x.is_low_closed, x.is_high_closed) == (y.is_low_closed, y.is_high_closed)
        and _equal(x.low, y.low)
        and _equal(x.high, y.high)
        for x, y in pairs
    )


def _low(piece: Piece) -> float:
    if "infty" in piece.low:
        return float("-inf") if piece.low.lstrip().startswith("-") else float("inf")
    number = parse_number(piece.low)
    return float(number.value) if number else symbolic.numeric_value(piece.low).real


def _lists(first: str, second: str) -> Comparison | None:
    """Tuples keep their order; sets and bare lists do not."""
    a, b = _items(first), _items(second)
    if a is None and b is None:
        return None
    if a is None or b is None:
        whole = first if a is None else second
        items = a or b or ([], False)
        is_single = len(items[0]) == 1 and not items[1]
        return Comparison(is_single and _equal(items[0][0], whole), "list")
    (items_a, is_ordered_a), (items_b, is_ordered_b) = a, b
    if len(items_a) != len(items_b) or len(items_a) > _MAX_ITEMS:
        return Comparison(False, "list")
    if is_ordered_a and is_ordered_b:
        same = all(_equal(x, y) for x, y in zip(items_a, items_b, strict=True))
        return Comparison(same, "tuple")
    if is_ordered_a != is_ordered_b:
        return _tuple_against_list(items_a, items_b, is_ordered_a)
    return Comparison(_same_unordered(items_a, items_b), "list")


def _tuple_against_list(a: list[str], b: list[str], is_first_ordered: bool) -> Comparison:
    """`(1, 2)` equals `x = 1, y = 2`, whose names give the order; no other bare list."""
    tuple_items, listed = (a, b) if is_first_ordered else (b, a)
    named = [_ASSIGNMENT.match(item) for item in listed]
    if not all(named) or len({m["name"] for m in named if m}) != len(named):
        return Comparison(False, "tuple")
    ordered = sorted((m["name"], m["value"]) for m in named if m)
    same = all(_equal(x, y) for x, (_, y) in zip(tuple_items, ordered, strict=True))
    return Comparison(same, "tuple")


def _same_unordered(a: list[str], b: list[str]) -> bool:
    rest = list(b)
    for item in a:
        match = next((other for other in rest if _equal(item, other)), None)
        if match is None:
            return False
        rest.remove(match)
    return not rest


def _items(text: str) -> tuple[list[str], bool] | None:
    """The items of a list and whether their order counts; None for a single value."""
    text = _ASSIGNMENT.sub(lambda m: m["value"], text) if text.count("=") == 1 else text
    text = _NAMED_TUPLE.sub("", text).strip()
    for opening, closing, is_ordered in (
        (r"\{", r"\}", False), ("(", ")", True), (r"\langle", r"\rangle", True), ("[", "]", True),
    ):  # fmt: skip
        inside = text[len(opening) : len(text) - len(closing)]
        if text.startswith(opening) and text.endswith(closing) and _is_whole(inside):
            parts = split_top(inside, ",")
            if len(parts) > 1 or not is_ordered:
                return _expanded(parts), is_ordered
    if parse_number(text) and not re.search(r",\s", text):
        return None
    text = re.sub(r"\s*,?\s+(?:and|or)\s+|\s*;\s*|\\vee|\\wedge", ",", text)
    parts = _expanded([part for part in split_top(text, ",") if part])
    return (parts, False) if len(parts) > 1 else None


def _is_whole(inside: str) -> bool:
    """Whether no bracket closes that was not opened inside."""
    depth = 0
    for character in inside:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _expanded(parts: list[str]) -> list[str]:
    r"""`a \pm b` stands for two values."""
    found = []
    for part in parts:
        if part.count(r"\pm") == 1:
            found += [part.replace(r"\pm", "+").lstrip("+ "), part.replace(r"\pm", "-")]
        else:
            found.append(part)
    return found


def _assignments(first: str, second: str) -> Comparison | None:
    """`x = 5` against `5`; between two equations the same name on the left."""
    a, b = _ASSIGNMENT.match(first), _ASSIGNMENT.match(second)
    if a and b and a["name"] != b["name"] and _has_letters(a["value"] + b["value"]):
        return None
    if not (a or b):
        return None
    if (not a and "=" in first) or (not b and "=" in second):
        return None
    found = compare(a["value"] if a else first, b["value"] if b else second)
    return Comparison(found.is_equal, found.reason)


def _has_letters(text: str) -> bool:
    return re.search(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])", text) is not None


def _quantities(raw_first: str, raw_second: str) -> Comparison | None:
    (value_a, unit_a), (value_b, unit_b) = split_unit(raw_first), split_unit(raw_second)
    if unit_a is None and unit_b is None:
        return None
    if unit_a is not None and unit_b is not None:
        return _same_quantity(value_a, unit_a, value_b, unit_b)
    unit, bare = (unit_a, value_b) if unit_a is not None else (unit_b, value_a)
    assert unit is not None
    if unit.dimensions == (("angle", 1),) and r"\pi" in bare:
        degrees = value_a if unit_a is not None else value_b
        return Comparison(_equal(rf"\frac{{({degrees})\pi}}{{180}}", bare), "angle")
    if not unit.is_sure:
        return None
    found = compare(value_a, value_b)
    return Comparison(found.is_equal, "unit_omitted" if found.is_equal else found.reason)


def _same_quantity(value_a: str, unit_a: Unit, value_b: str, unit_b: Unit) -> Comparison:
    if unit_a.dimensions != unit_b.dimensions:
        return Comparison(False, "unit")
    if unit_a.factor == unit_b.factor:
        return Comparison(_equal(value_a, value_b), "quantity")
    a, b = parse_number(value_a), parse_number(value_b)
    if a is None or b is None:
        return Comparison(False, "unit")
    return Comparison(a.value * unit_a.factor == b.value * unit_b.factor, "quantity")


def _ratios(first: str, second: str) -> Comparison | None:
    a, b = _RATIO.fullmatch(first), _RATIO.fullmatch(second)
    if not (a or b):
        return None
    x = f"\\frac{{{a[1]}}}{{{a[2]}}}" if a else first
    y = f"\\frac{{{b[1]}}}{{{b[2]}}}" if b else second
    if ":" in x or ":" in y:
        return None
    return Comparison(_equal(x, y), "ratio")


def _words(first: str, second: str) -> Comparison | None:
    if not (_WORDS.fullmatch(first) and _WORDS.fullmatch(second)):
        return None
    if len(first) < 2 or len(second) < 2:
        return Comparison(False, "text") if first.lower() == second.lower() else None
    a, b = (re.sub(r"^(?:the|a|an) ", "", text.lower()).strip() for text in (first, second))
    if a == b:
        return Comparison(True, "words")
    # Two words are no product of letters; single terms such as ab and ba may be.
    return Comparison(False, "words") if max(len(first), len(second)) > 3 else None


def _expressions(first: str, second: str) -> Comparison:
    try:
        if symbolic.same_expression(first, second):
            return Comparison(True, "expression")
        if _is_rounded(first, second) or _is_rounded(second, first):
            return Comparison(True, "rounded")
    except Unreadable:
        return Comparison(False, "not_comparable")
    return Comparison(False, "expression")


def _is_rounded(exact: str, decimal: str) -> bool:
    """A decimal of at least six places stands for an expression that has no exact decimal."""
    number: Number | None = parse_number(decimal)
    if number is None or (number.num_decimals or 0) < 6 or _has_letters(exact.replace("e", "")):
        return False
    if abs(number.value) < Fraction(1, 10):
        return False
    return symbolic.rounds_to(exact, number.value, number.num_decimals or 0)
