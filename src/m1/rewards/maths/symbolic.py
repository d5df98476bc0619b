r"""Expressions through math-verify's LaTeX parser, with the vetoes that its verdicts need.

The whole text must parse: no part of it is searched for something that does, which is where its
default extraction finds 4 in `4\sqrt(2)`. Numbers decide before simplification does, so two
expressions that differ at any of a few points are never called equal.
"""

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import latex2sympy
from math_verify import verify

from m1.rewards.maths.normal import nesting

_MAX_CHARACTERS = 300
_MAX_NESTING = 20
_MAX_EXPONENT = 2000
_DIGITS = 40
_POINTS = (
    (Fraction(13, 10), Fraction(7, 11), Fraction(29, 17), Fraction(19, 23)),
    (Fraction(-17, 13), Fraction(23, 19), Fraction(-5, 7), Fraction(31, 11)),
    (Fraction(41, 37), Fraction(-3, 11), Fraction(-43, 31), Fraction(-2, 13)),
)
_NUMBER_BEFORE_BRACKET = re.compile(r"(?<![\w^_{.\\])(\d+(?:\.\d+)?)\s*(?=\()")
_BRACKETS_SIDE_BY_SIDE = re.compile(r"(?<=\))\s*(?=\()")
_MIXED = re.compile(r"(?<![\w}])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}")
_CHAINED_POWERS = re.compile(r"\^\s*\{?[^{}]*\^|\^\s*\{[^{}]*\{[^{}]*\}?[^{}]*\^")
_LONG_POWER = re.compile(r"\^\s*\{?\s*[+-]?\s*(\d{4,})")
_NUMBER_IN_POWER = re.compile(r"\d[^a-z]*\^[^a-z]*\d", re.IGNORECASE)
_BIG_FACTORIAL = re.compile(r"\d{4,}\s*\)?\s*!|!\s*\)?\s*!")
_UNEVALUATED = re.compile(r"\\(?:bmod|mod|pmod)|\bmod\b")


class Unreadable(Exception):
    """The text is no expression that this module trusts itself to read."""


def same_expression(reference: str, answer: str) -> bool:
    """Whether two normalised LaTeX expressions or equations mean the same.

    Raises:
        Unreadable: One of them does not parse as a whole, or would be dangerous to evaluate.
    """
    first, second = _parsed(reference), _parsed(answer)
    if _is_equation(first) or _is_equation(second):
        return _is_equation(first) and _is_equation(second) and _same_equation(first, second)
    decided = _compare_numerically(first, second)
    return decided if decided is not None else _math_verify(first, second)


def numeric_value(text: str) -> complex:
    """An expression without variables as a number of double precision.

    Raises:
        Unreadable: It is no such expression.
    """
    value = _evaluate(_parsed(text), ())
    if value is None:
        raise Unreadable(f"{text[:50]!r} has no value")
    return complex(value)


def rounds_to(text: str, value: Fraction, places: int) -> bool:
    """Whether a decimal with `places` digits is the rounding of an expression's value."""
    number = numeric_value(text)
    half = 0.5 * 10.0**-places
    close = abs(number.real - float(value)) <= half * (1 + 1e-9)
    return close and abs(number.imag) <= half


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Any:
    """The sympy expression of a text; commands that only mark type are gone already."""
    _refuse_dangerous(text)
    text = _MIXED.sub(r"(\1+\\frac{\2}{\3})", text)
    text = _NUMBER_BEFORE_BRACKET.sub(r"\1\\cdot ", text)
    text = _BRACKETS_SIDE_BY_SIDE.sub(r"\\cdot ", text)
    try:
        expression = latex2sympy(text)
    except RecursionError:
        raise
    except Exception as error:  # the parser raises bare Exception on what it does not know
        raise Unreadable(str(error)[:200]) from error
    if isinstance(expression, str) or not isinstance(expression, sympy.Basic):
        matrix_like = getattr(sympy, "MatrixBase", ())
        if not isinstance(expression, matrix_like):
            raise Unreadable(f"{text[:50]!r} is no expression")
    letters = {"e": sympy.E, "i": sympy.I, "pi": sympy.pi}
    constants = {s: letters[s.name] for s in expression.free_symbols if s.name in letters}
    exact = {number: sympy.Rational(str(number)) for number in expression.atoms(sympy.Float)}
    return expression.subs(constants).xreplace(exact)


def _refuse_dangerous(text: str) -> None:
    """Refuse what takes forever to parse or evaluate, before anything evaluates it."""
    if len(text) > _MAX_CHARACTERS:
        raise Unreadable(f"{len(text)} characters")
    if nesting(text) > _MAX_NESTING:
        raise Unreadable(f"{nesting(text)} nested brackets")
    if _UNEVALUATED.search(text):
        raise Unreadable("an unevaluated remainder")
    if _CHAINED_POWERS.search(text) and _NUMBER_IN_POWER.search(text):
        raise Unreadable("a tower of powers")
    if any(int(power) > _MAX_EXPONENT for power in _LONG_POWER.findall(text)):
        raise Unreadable("a power too large to evaluate")
    if _BIG_FACTORIAL.search(text):
        raise Unreadable("a factorial too large to evaluate")
    if '"' in text or "_{_" in text or "__" in text:
        raise Unreadable("no mathematics")


def _is_equation(expression: Any) -> bool:
    return isinstance(expression, sympy.Equality)


def _same_equation(first: Any, second: Any) -> bool:
    """Whether left minus right of one is a constant multiple of the other's."""
    a, b = first.lhs - first.rhs, second.lhs - second.rhs
    if a.free_symbols != b.free_symbols:
        return False
    ratios = []
    for point in _POINTS:
        values = _substitution(a.free_symbols, point)
        top, bottom = _evaluate(a, values), _evaluate(b, values)
        if top is None or bottom is None or bottom == 0 or top == 0:
            return False
        ratios.append(top / bottom)
    return all(abs(ratio - ratios[0]) < 1e-15 * abs(ratios[0]) for ratio in ratios)


def _compare_numerically(first: Any, second: Any) -> bool | None:
    """Equality at a few points to many digits; None when a value cannot be had."""
    if getattr(first, "is_Matrix", False) or getattr(second, "is_Matrix", False):
        return None
    symbols = first.free_symbols | second.free_symbols
    if len(symbols) > len(_POINTS[0]):
        return None
    points = _POINTS if symbols else _POINTS[:1]
    compared = 0
    for point in points:
        values = _substitution(symbols, point)
        a, b = _evaluate(first, values), _evaluate(second, values)
        if a is None or b is None:
            continue
        compared += 1
        if abs(a - b) > 10.0 ** (10 - _DIGITS) * max(1, abs(a)):
            return False
    return True if compared == len(points) else None


def _substitution(symbols: Any, point: tuple[Fraction, ...]) -> tuple[tuple[Any, Any], ...]:
    ordered = sorted(symbols, key=lambda symbol: symbol.name)
    return tuple(
        (symbol, sympy.Rational(value.numerator, value.denominator))
        for symbol, value in zip(ordered, point, strict=False)
    )


def _evaluate(expression: Any, values: tuple[tuple[Any, Any], ...]) -> Any:
    try:
        value = expression.subs(values).evalf(_DIGITS)
    except (ArithmeticError, AttributeError, TypeError, ValueError):
        return None
    is_number = getattr(value, "is_number", False) and getattr(value, "is_finite", False)
    return value if is_number else None


def _math_verify(first: Any, second: Any) -> bool:
    """math-verify's own comparison, for what has no number: sums to n, infinities, sets."""
    if first == second:
        return True
    if first.free_symbols != second.free_symbols:
        return False
    # It warns that nobody bounds its time; the worker's service does.
    logging.getLogger("math_verify.grader").setLevel(logging.ERROR)
    return bool(verify([first], [second], timeout_seconds=None))
