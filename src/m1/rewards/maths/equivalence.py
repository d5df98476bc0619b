"""Whether two answers are the same: from text, over types, to expressions."""

import re
from fractions import Fraction

from m1.rewards.maths import kinds, symbolic
from m1.rewards.maths.intervals import Piece, names_a_set, parse_set, split_top
from m1.rewards.maths.kinds import Comparison
from m1.rewards.maths.normal import compact, nesting, normalize
from m1.rewards.maths.numbers import Number, parse_number, same_number
from m1.rewards.maths.symbolic import Unreadable

_MAX_NESTING = 60
_MAX_ITEMS = 40
_ASSIGNMENT = re.compile(
    r"^\s*(?P<name>[A-Za-z](?:_\{?\w+\}?)?|\\(?:theta|alpha|beta|lambda)|"
    r"[A-Za-z]{1,2}'?\s*\([A-Za-z0-9, ]+\))"
    r"\s*(?:=|\\in|\\approx|\\equiv|:)\s*(?P<value>[^=<>]+)$"
)
_NAMED_TUPLE = re.compile(r"^\([A-Za-z]\w?(?:, ?[A-Za-z]\w?)+\)\s*=\s*(?=\()")
_MATRIX = re.compile(r"\\begin\{(?:[pbBvV]?matrix|array)\}(?:\{[lcr|]+\})?(.*?)\\end\{[A-Za-z]+\}")
_MODULUS = re.compile(r"\\(?:bmod|pmod|mod)|\bmod\b")


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
    found = kinds.bases(first, second) or kinds.times(first, second)
    found = found or kinds.percents(first, second, _equal) or kinds.choices(first, second)
    for check in (_matrices, _sets, _lists, _assignments):
        found = found or check(first, second)
    found = found or kinds.quantities(raw_first, raw_second, _equal)
    found = found or kinds.ratios(first, second, _equal) or kinds.words(first, second)
    return found or _expressions(first, second)


def _equal(first: str, second: str) -> bool:
    return compare(first, second).is_equal


def _has_separator_conflict(first: str, second: str) -> bool:
    """`1,234` against `1, 234`: one is a number, the other may be two."""
    return any(", " in text for text in (first, second))


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
