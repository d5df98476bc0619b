"""Rational numbers in all their spellings, exactly and without a parser of expressions."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

_MAX_DIGITS = 400
_MAX_EXPONENT = 400
_MAX_FACTORIAL = 3000

_INTEGER = r"\d+"
_GROUPED = r"\d{1,3}(?:,\d{3})+"
_DECIMAL = rf"(?:{_GROUPED}|{_INTEGER})?(?:\.\d+)?"
_PLAIN = re.compile(rf"(?P<sign>[+-]?)\s*(?P<number>{_DECIMAL}|(?:{_GROUPED}|{_INTEGER})\.)")
_SCIENTIFIC = re.compile(
    rf"(?P<sign>[+-]?)\s*(?P<number>{_DECIMAL})\s*(?:[eE]|(?:\\times|\\cdot|x|\*)\s*10\s*\^)\s*"
    r"\{?\s*(?P<exponent>[+-]?\d{1,4})\s*\}?"
)
_POWER_OF_TEN = re.compile(r"(?P<sign>[+-]?)\s*10\s*\^\s*\{?\s*(?P<exponent>[+-]?\d{1,4})\s*\}?")
_SLASH = re.compile(
    r"(?P<sign>[+-]?)\s*\(?(?P<top>[+-]?\s*[\d.,]+)\)?\s*/\s*\(?(?P<bottom>[+-]?\s*[\d.,]+)\)?"
)
_FRAC = re.compile(
    r"(?P<sign>[+-]?)\s*\\frac\s*\{\s*(?P<top>[+-]?\s*[\d.,]+)\s*\}"
    r"\s*\{\s*(?P<bottom>[+-]?\s*[\d.,]+)\s*\}"
)
_MIXED = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<whole>\d+)\s*(?:\\frac\{(?P<top>\d+)\}\{(?P<bottom>\d+)\}|"
    r"\s(?P<top2>\d+)\s*/\s*(?P<bottom2>\d+))"
)
_REPEATING = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<whole>\d*)\.(?P<fixed>\d*)\s*"
    r"(?:\\(?:overline|bar|dot)\s*\{?\s*(?P<cycle>\d+)\s*\}?|\((?P<cycle2>\d+)\))"
)
_BASE = re.compile(r"(?P<digits>[0-9A-Za-z]+)\s*_\s*\{?\s*(?P<base>\d{1,2})\s*\}?")
_BASE_WORDS = re.compile(r"(?P<digits>[0-9A-F]+)\s*\(?(?:in )?base\s*(?P<base>\d{1,2})\)?")
_FACTORIAL = re.compile(r"(?P<sign>[+-]?)\s*(?P<top>\d+\s*/\s*)?\(?(?P<n>\d{1,5})\)?\s*!")
_FACTORIAL_FRACTION = re.compile(r"(?P<sign>[+-]?)\s*\\frac\{(?P<top>\d+)\}\{(?P<n>\d{1,5})!\}")
_INTEGER_POWER = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<base>\d{1,6})\s*\^\s*\{?\s*(?P<exponent>\d{1,3})\s*\}?"
)
_MODULUS = re.compile(
    r"\(?(?P<base>\d+)\s*(?:\^\s*\{?(?P<exponent>[\d^{} ]+?)\}?)?\s*\)?\s*"
    r"\\(?:bmod|mod|pmod)\s*\{?\s*(?P<modulus>\d+)\s*\}?"
)
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {
    **{word: Fraction(value) for value, word in enumerate(_UNITS.split())},
    **{word: Fraction(10 * value) for value, word in enumerate(_TENS.split(), start=2)},
    "one hundred": Fraction(100),
    "one thousand": Fraction(1000),
    "half": Fraction(1, 2),
    "one half": Fraction(1, 2),
    "one third": Fraction(1, 3),
    "two thirds": Fraction(2, 3),
    "one fourth": Fraction(1, 4),
    "one quarter": Fraction(1, 4),
    "three quarters": Fraction(3, 4),
}


@dataclass(frozen=True)
class Number:
    """An exact number and how it was written."""

    value: Fraction
    num_decimals: int | None = None
    """Digits after the point of a plain decimal; None for what is no decimal."""


def parse_number(text: str) -> Number | None:
    """A normalised text as an exact rational number, or None when it is something else.

    Integers, decimals, thousands separators, fractions, mixed numbers, powers of ten, repeating
    decimals, small integer powers and factorials, `a mod m`, English words up to a hundred.
    """
    text = _unwrapped(text)
    if not text or len(text) > _MAX_DIGITS:
        return None
    for read in (_plain, _fraction, _mixed, _scientific, _repeating, _power, _factorial, _mod):
        found = read(text)
        if found is not None:
            return found
    word = re.sub(r"[\s-]+", " ", text.lower()).strip()
    if word in _WORDS:
        return Number(_WORDS[word])
    tens, _, unit = word.partition(" ")
    if tens.endswith("ty") and tens in _WORDS and unit in _WORDS and 0 < _WORDS[unit] < 10:
        return Number(_WORDS[tens] + _WORDS[unit])
    return None


def parse_based(text: str) -> tuple[str, int] | None:
    """Digits and base of a number such as `1010_2` or `FF base 16`; None for anything else."""
    match = _BASE.fullmatch(text) or _BASE_WORDS.fullmatch(text)
    if match is None or not 2 <= int(match["base"]) <= 36:
        return None
    try:
        int(match["digits"], int(match["base"]))
    except ValueError:
        return None
    return match["digits"].lstrip("0").upper() or "0", int(match["base"])


def same_number(reference: Number, answer: Number) -> bool:
    """Exact equality, or rounding to at least six decimals and six significant digits."""
    if reference.value == answer.value:
        return True
    for exact, rounded in ((reference, answer), (answer, reference)):
        places = rounded.num_decimals
        if places is None or places < 6 or exact.num_decimals is not None:
            continue
        if abs(rounded.value) * 10**places < 10**5:
            continue
        if abs(exact.value - rounded.value) <= Fraction(1, 2 * 10**places):
            return True
    return False


def _unwrapped(text: str) -> str:
    text = text.strip()
    while len(text) > 2 and text[0] + text[-1] in ("()", "{}") and _is_pair(text):
        text = text[1:-1].strip()
    return text


def _is_pair(text: str) -> bool:
    """Whether the first bracket closes with the last."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "({") - (character in ")}")
        if depth == 0:
            return position == len(text) - 1
    return False


def _plain(text: str) -> Number | None:
    match = _PLAIN.fullmatch(text)
    if match is None or not any(c.isdigit() for c in text):
        return None
    digits = match["number"].replace(",", "")
    places = len(digits.partition(".")[2]) if "." in digits else None
    return Number(_signed(match, Fraction(digits.rstrip("."))), places)


def _fraction(text: str) -> Number | None:
    match = _FRAC.fullmatch(text) or _SLASH.fullmatch(text)
    if match is None:
        return None
    top, bottom = _plain(match["top"]), _plain(match["bottom"])
    if top is None or bottom is None or bottom.value == 0:
        return None
    return Number(_signed(match, top.value / bottom.value))


def _mixed(text: str) -> Number | None:
    match = _MIXED.fullmatch(text)
    if match is None:
        return None
    top, bottom = match["top"] or match["top2"], match["bottom"] or match["bottom2"]
    if int(bottom) == 0 or int(top) >= int(bottom):
        return None
    return Number(_signed(match, int(match["whole"]) + Fraction(int(top), int(bottom))))


def _scientific(text: str) -> Number | None:
    match = _SCIENTIFIC.fullmatch(text)
    if match is not None and any(c.isdigit() for c in match["number"]):
        factor = Fraction(match["number"].replace(",", ""))
    else:
        match, factor = _POWER_OF_TEN.fullmatch(text), Fraction(1)
    if match is None or abs(int(match["exponent"])) > _MAX_EXPONENT:
        return None
    return Number(_signed(match, factor * Fraction(10) ** int(match["exponent"])))


def _repeating(text: str) -> Number | None:
    match = _REPEATING.fullmatch(text)
    if match is None:
        return None
    fixed, cycle = match["fixed"], match["cycle"] or match["cycle2"]
    value = Fraction(int(match["whole"] or 0))
    value += Fraction(int(fixed or 0), 10 ** len(fixed))
    value += Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed))
    return Number(_signed(match, value))


def _power(text: str) -> Number | None:
    match = _INTEGER_POWER.fullmatch(text)
    if match is None:
        return None
    return Number(_signed(match, Fraction(int(match["base"]) ** int(match["exponent"]))))


def _factorial(text: str) -> Number | None:
    match = _FACTORIAL.fullmatch(text) or _FACTORIAL_FRACTION.fullmatch(text)
    if match is None or int(match["n"]) > _MAX_FACTORIAL:
        return None
    value = Fraction(math.factorial(int(match["n"])))
    if match["top"]:
        value = Fraction(int(match["top"].rstrip("/ "))) / value
    return Number(_signed(match, value))


def _mod(text: str) -> Number | None:
    """`b^e mod m` by modular exponentiation; a tower in e by Euler's theorem is left to others."""
    match = _MODULUS.fullmatch(text)
    if match is None or int(match["modulus"]) == 0:
        return None
    exponent = (match["exponent"] or "1").strip(" {}")
    if not exponent.isdigit() or len(exponent) > _MAX_DIGITS:
        return None
    return Number(Fraction(pow(int(match["base"]), int(exponent), int(match["modulus"]))))


def _signed(match: re.Match[str], value: Fraction) -> Fraction:
    return -value if match["sign"] == "-" else value
