"""Quantities: a value and a unit, so that 5 cm equals 50 mm and is not 5 m."""

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from m1.rewards.maths.normal import normalize

_PREFIXES: dict[str, int | Fraction] = {
    "kilo": 1000,
    "centi": Fraction(1, 100),
    "milli": Fraction(1, 1000),
    "micro": Fraction(1, 10**6),
    "mega": 10**6,
    "giga": 10**9,
}
_INCH = Fraction(254, 10000)
_POUND = Fraction(45359237, 10**8)
_TABLE: dict[str, tuple[str, Fraction | int]] = {
    "m": ("length", 1), "meter": ("length", 1), "metre": ("length", 1),
    "km": ("length", 1000), "cm": ("length", Fraction(1, 100)),
    "dm": ("length", Fraction(1, 10)), "mm": ("length", Fraction(1, 1000)),
    "nm": ("length", Fraction(1, 10**9)), "in": ("length", _INCH), "inch": ("length", _INCH),
    "inches": ("length", _INCH), "ft": ("length", 12 * _INCH), "foot": ("length", 12 * _INCH),
    "feet": ("length", 12 * _INCH), "yd": ("length", 36 * _INCH), "yard": ("length", 36 * _INCH),
    "mi": ("length", 63360 * _INCH), "mile": ("length", 63360 * _INCH),
    "g": ("mass", Fraction(1, 1000)), "gram": ("mass", Fraction(1, 1000)), "kg": ("mass", 1),
    "mg": ("mass", Fraction(1, 10**6)), "tonne": ("mass", 1000), "lb": ("mass", _POUND),
    "pound": ("mass", _POUND), "oz": ("mass", _POUND / 16), "ounce": ("mass", _POUND / 16),
    "s": ("time", 1), "sec": ("time", 1), "second": ("time", 1), "ms": ("time", Fraction(1, 1000)),
    "min": ("time", 60), "minute": ("time", 60), "h": ("time", 3600), "hr": ("time", 3600),
    "hour": ("time", 3600), "day": ("time", 86400), "week": ("time", 604800),
    "l": ("volume", Fraction(1, 1000)), "liter": ("volume", Fraction(1, 1000)),
    "litre": ("volume", Fraction(1, 1000)), "ml": ("volume", Fraction(1, 10**6)),
    "dollar": ("money", 1), "usd": ("money", 1), "buck": ("money", 1),
    "cent": ("money", Fraction(1, 100)), "euro": ("euro", 1), "eur": ("euro", 1),
    "gbp": ("sterling", 1), "yen": ("yen", 1), "rupee": ("rupee", 1), "degree": ("angle", 1),
    "deg": ("angle", 1), "radian": ("radian", 1), "rad": ("radian", 1), "newton": ("force", 1),
    "n": ("force", 1), "joule": ("energy", 1), "j": ("energy", 1), "kj": ("energy", 1000),
    "watt": ("power", 1), "w": ("power", 1), "kw": ("power", 1000), "volt": ("voltage", 1),
    "v": ("voltage", 1), "ampere": ("current", 1), "amp": ("current", 1), "a": ("current", 1),
    "ohm": ("resistance", 1), "hz": ("frequency", 1), "hertz": ("frequency", 1),
    "kelvin": ("kelvin", 1), "celsius": ("celsius", 1), "fahrenheit": ("fahrenheit", 1),
    "mole": ("amount", 1), "mol": ("amount", 1), "pa": ("pressure", 1), "kpa": ("pressure", 1000),
    "mph": ("mph", 1), "kmh": ("kmh", 1), "unit": ("unit", 1),
}  # fmt: skip
_DERIVED: dict[str, tuple[dict[str, int], Fraction]] = {
    "mph": ({"length": 1, "time": -1}, 63360 * _INCH / 3600),
    "kmh": ({"length": 1, "time": -1}, Fraction(1000, 3600)),
    "volume": ({"length": 3}, Fraction(1)),
    "unit": ({}, Fraction(1)),
}
_NO_UNIT = {"and", "or", "is", "pi", "no", "yes", "true", "false", "mod", "to", "of", "if", "for",
            "where", "base", "am", "pm", "such", "all", "real", "integer", "max", "gcd", "lcm",
            "not", "with", "than", "between", "i", "e", "x", "y", "z", "n", "k"}  # fmt: skip
_TRAILING = re.compile(
    r"(?P<value>.*?(?:[\d.)}\]%]|\\pi))\s*(?P<unit>(?:(?:square|cubic|sq\.?|cu\.?|per|a)\s+|/\s*|\\cdot\s*|"
    r"(?<![\\A-Za-z])[A-Za-z]{1,15}\.?(?:\s*\^\s*\{?-?\d\}?)?\s*|\^\{\\circ\}\s*[CFK]?\s*)+)"
)
_ATOM = re.compile(r"(?P<name>[A-Za-z]+)\.?(?:\s*\^\s*\{?(?P<power>-?\d)\}?)?")
_MONEY = re.compile(r"(?:\\\$|(?<!\$)\$(?=\s*\d)|[€£])\s*(?P<value>\d[\d,]*(?:\.\d+)?)")
_MONEY_NAMES = {"€": "euros", "£": "gbp"}
_MARKED = re.compile(r"\\(?:text|mathrm|textrm|textbf|mbox|operatorname|rm)\b")


@dataclass(frozen=True)
class Unit:
    """A product of powers of dimensions with a factor to their base, or an unknown word."""

    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction
    is_sure: bool
    """Whether it can only be a unit; a lone letter could be a variable."""


def split_unit(raw: str) -> tuple[str, Unit | None]:
    """Value and unit of an answer; the normalised text and None where there is no unit."""
    text = _with_money_in_words(raw)
    is_marked = _MARKED.search(text) is not None
    text = normalize(text)
    match = _TRAILING.fullmatch(text)
    if match is None:
        return text, None
    unit = _read(match["unit"].strip(), is_marked=is_marked)
    value = match["value"].strip()
    if unit is None or not re.search(r"\d|\\(?:pi|sqrt|frac)", value):
        return text, None
    return value, unit


def _with_money_in_words(raw: str) -> str:
    stripped = raw.strip()
    is_single = stripped.count("$") - stripped.count(r"\$") == 1
    match = _MONEY.search(stripped)
    if match is None or (match.group()[0] == "$" and not is_single):
        return raw
    name = next((n for sign, n in _MONEY_NAMES.items() if sign in match.group()), "dollars")
    rest = stripped[: match.start()] + match["value"] + stripped[match.end() :]
    has_name = re.search(r"dollar|usd|euro|gbp|cent", rest, re.IGNORECASE)
    tail = re.search(r"\$\s*$", rest)
    if tail:
        rest = rest[: tail.start()]
        rest = rest.lstrip().removeprefix("$")
    return rest if has_name else rf"{rest}\text{{ {name}}}"


def _read(text: str, *, is_marked: bool) -> Unit | None:
    if text.startswith(r"^{\circ}"):
        scale = text.removeprefix(r"^{\circ}").strip()
        name = {"C": "celsius", "F": "fahrenheit", "K": "kelvin", "": "angle"}.get(scale)
        return None if name is None else Unit(((name, 1),), Fraction(1), True)
    dimensions: Counter[str] = Counter()
    factor, sign, prefix_power, is_sure = Fraction(1), 1, 1, is_marked
    words = re.findall(r"/|\\cdot|[A-Za-z]+\.?(?:\s*\^\s*\{?-?\d\}?)?", text)
    unknown: list[str] = []
    for word in words:
        bare = word.lower().rstrip(".")
        if word in ("/",) or bare == "per":
            sign = -1
        elif word == r"\cdot":
            continue
        elif bare in ("square", "sq", "cubic", "cu"):
            prefix_power, is_sure = (2 if bare.startswith("sq") else 3), True
        else:
            atom = _ATOM.fullmatch(word)
            assert atom
            name = atom["name"]
            power = sign * prefix_power * int(atom["power"] or 1)
            prefix_power = 1
            found = _lookup(name)
            if found is None:
                unknown.append(name.lower().rstrip("s"))
                continue
            is_sure |= len(name) > 2 or name in ("cm", "mm", "km", "kg", "ft", "mi", "lb", "hr")
            own, own_factor = found
            for dimension, exponent in own.items():
                dimensions[dimension] += exponent * power
            factor *= own_factor**power
    if unknown:
        if any(name in _NO_UNIT or len(name) < 2 for name in unknown):
            return None
        return Unit(tuple(("word " + name, 1) for name in unknown), Fraction(1), True)
    if not words:
        return None
    kept = tuple(sorted((name, power) for name, power in dimensions.items() if power))
    return Unit(kept, factor, is_sure)


def _lookup(name: str) -> tuple[dict[str, int], Fraction] | None:
    lower = name.lower()
    if len(name) == 1 and name not in _TABLE and name not in ("L", "N", "J", "V", "W", "A"):
        return None
    for candidate in (lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if candidate in _TABLE:
            return _base(*_TABLE[candidate])
        for prefix, scale in _PREFIXES.items():
            rest = candidate.removeprefix(prefix)
            if rest != candidate and len(rest) > 3 and rest in _TABLE:
                dimensions, factor = _base(*_TABLE[rest])
                return dimensions, factor * Fraction(scale)
    return None


def _base(dimension: str, factor: Fraction | int) -> tuple[dict[str, int], Fraction]:
    if dimension in _DERIVED:
        dimensions, scale = _DERIVED[dimension]
        return dict(dimensions), Fraction(factor) * scale
    return {dimension: 1}, Fraction(factor)
