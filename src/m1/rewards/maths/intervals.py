"""Sets of real numbers, as intervals, inequalities or words, cut into comparable pieces."""

import re
from dataclasses import dataclass
from itertools import pairwise

_RELATION = re.compile(r"(\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|<=|>=|<|>|=)")
_ELEMENT_OF = re.compile(r"^[A-Za-z](?:_\d)?\s*\\in\s*")
_VARIABLE = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?|\\(?:theta|alpha|beta|lambda|phi)|[a-z]\([a-z]\)")
_UNION = re.compile(r"\\cup|(?<=[)\]}])\s*U\s*(?=[(\[\\{])|\s(?:or)\s|\\vee")
_ALL = re.compile(r"\\mathbb\{?R\}?|R|all real(?:s| numbers| values)?(?: of [a-z])?|\\R")
_NONE = re.compile(r"\\emptyset|\\\{\s*\\\}|\\phi|(?:the )?empty set|no (?:real )?solutions?|none")
_REMOVED = re.compile(r"(?:\\mathbb\{?R\}?|R)\s*(?:\\setminus|\\backslash|-)\s*\\\{(.+)\\\}")
_FLIP = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\ne": r"\ne"}
_INFINITY = r"\infty"


@dataclass(frozen=True)
class Piece:
    """One interval; a point has equal closed ends. Ends are LaTeX texts."""

    low: str
    high: str
    is_low_closed: bool
    is_high_closed: bool


def parse_set(text: str) -> list[Piece] | None:
    """Pieces of a normalised text that names a set by its form; None when it does not.

    A bare `(a, b)` counts as an interval here; the caller knows whether it may be a point.
    """
    text = _ELEMENT_OF.sub("", text).strip()
    if _ALL.fullmatch(text):
        return [_everything()]
    if _NONE.fullmatch(text):
        return []
    removed = _REMOVED.fullmatch(text)
    if removed:
        return _without(split_top(removed[1], ","))
    pieces: list[Piece] = []
    for part in _UNION.split(text):
        found = _part(part.strip())
        if found is None:
            return None
        pieces += found
    return pieces


def names_a_set(text: str) -> bool:
    """Whether a text has the marks of a set: relations, unions, infinities, reals, emptiness."""
    if _ALL.fullmatch(text) and text != "R":
        return True
    has_marks = re.search(r"\\le\b|\\ge\b|\\ne\b|[<>]|\\cup|\\in\b|\\setminus|\\emptyset", text)
    is_half_open = re.fullmatch(r"\s*(?:\[.*\)|\(.*\]|\[.*\])\s*", text) and "," in text
    return bool(has_marks or is_half_open or (_INFINITY in text and "," in text))


def split_top(text: str, separator: str) -> list[str]:
    """Split at a separator that stands in no bracket."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        character = text[position]
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif depth == 0 and text.startswith(separator, position):
            parts.append(text[start:position])
            position += len(separator)
            start = position
            continue
        position += 1
    return [part.strip() for part in (*parts, text[start:])]


def _everything() -> Piece:
    return Piece("-" + _INFINITY, _INFINITY, False, False)


def _part(text: str) -> list[Piece] | None:
    bracketed = re.fullmatch(r"([(\[])(.+)([)\]])", text)
    if bracketed:
        ends = split_top(bracketed[2], ",")
        if len(ends) != 2:
            return None
        is_low, is_high = bracketed[1] == "[", bracketed[3] == "]"
        return [Piece(_end(ends[0]), _end(ends[1]), is_low, is_high)]
    listed = re.fullmatch(r"\\\{(.+)\\\}", text)
    if listed and not re.search(r"[|:]|\\le|\\ge|<|>", listed[1]):
        return [Piece(item, item, True, True) for item in split_top(listed[1], ",")]
    if listed:  # set-builder notation
        condition = re.split(r"[|:]", listed[1], maxsplit=1)[-1]
        return _part(condition.strip())
    return _inequality(text)


def _inequality(text: str) -> list[Piece] | None:
    tokens = [token.strip() for token in _RELATION.split(text)]
    relations = [{"<=": r"\le", ">=": r"\ge"}.get(t, t) for t in tokens[1::2]]
    sides = tokens[0::2]
    if len(relations) == 1:
        return _single(sides[0], relations[0], sides[1])
    if len(relations) == 2 and _VARIABLE.fullmatch(sides[1]):
        low, high, first, second = sides[0], sides[2], *relations
        if first in (">", r"\ge") and second in (">", r"\ge"):
            low, high, first, second = high, low, _FLIP[second], _FLIP[first]
        if first in ("<", r"\le") and second in ("<", r"\le"):
            return [Piece(_end(low), _end(high), first == r"\le", second == r"\le")]
    return None


def _single(left: str, relation: str, right: str) -> list[Piece] | None:
    if not _VARIABLE.fullmatch(left):
        left, right, relation = right, left, _FLIP[relation]
    if not _VARIABLE.fullmatch(left) or not right:
        return None
    if relation == r"\ne":
        return _without([right])
    if relation == "=":
        return [Piece(right, right, True, True)]
    if relation in ("<", r"\le"):
        return [Piece("-" + _INFINITY, right, False, relation == r"\le")]
    return [Piece(right, _INFINITY, relation == r"\ge", False)]


def _without(points: list[str]) -> list[Piece]:
    ends = ["-" + _INFINITY, *points, _INFINITY]
    return [Piece(a, b, False, False) for a, b in pairwise(ends)]


def _end(text: str) -> str:
    text = text.strip()
    return _INFINITY if text in ("+" + _INFINITY, "+ " + _INFINITY) else text.replace("- ", "-")
