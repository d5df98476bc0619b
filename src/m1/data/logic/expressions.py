"""Games of arithmetic expressions: game of 24, mathador."""

import re
from collections import Counter
from fractions import Fraction
from math import perm
from random import Random
from typing import Any

from m1.data.logic.base import LogicTask, Puzzle, WrongAnswer, integer


class GameOf24(LogicTask):
    """An expression of all the numbers that makes a target."""

    name = "game_of_24"
    _kind = "exactly"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Combine random numbers at random until the result is a small integer."""
        count = 3 + (difficulty + 1) // 4
        while True:
            numbers = [rng.randint(1, 5 + difficulty) for _ in range(count)]
            expression, value = _combined(rng, numbers)
            is_24 = value == 24 or difficulty > 3 or count == 3
            if value.denominator == 1 and 1 < value <= 100 and is_24:
                break
        target = int(value)
        data = {"numbers": sorted(numbers), "target": target, "must_use_all": True}
        question = (
            f"Use each of the numbers {', '.join(map(str, sorted(numbers)))} exactly once, with +, "
            f"-, *, / and brackets, to make {target}. Answer with the expression only."
        )
        return Puzzle(question, expression, data)

    def check(self, data: dict[str, Any], answer: str) -> None:
        """Parse by hand; the numbers must be the given ones and the value the target."""
        value, used = evaluate(answer.split("=")[0])
        given = Counter(data["numbers"])
        if data["must_use_all"] and Counter(used) != given:
            raise WrongAnswer("other_numbers")
        if Counter(used) - given:
            raise WrongAnswer("other_numbers")
        if value != data["target"]:
            raise WrongAnswer("other_value")
        rest = answer.split("=")[1:]
        if len(rest) > 1 or (rest and integer(rest[0]) != data["target"]):
            raise WrongAnswer("malformed")

    def cost(self, data: dict[str, Any]) -> float:
        """Choices of numbers in order, times choices of operators."""
        used = data.get("least", len(data["numbers"]))
        return float(perm(len(data["numbers"]), used) * 4 ** (used - 1))


class Mathador(GameOf24):
    """Make a target from some of five numbers, using at least a given number of operators."""

    name = "mathador"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Combine some of the numbers; the others distract."""
        used = 2 + (difficulty + 2) // 3
        while True:
            numbers = [rng.randint(1, 4 + 2 * difficulty) for _ in range(used)]
            expression, value = _combined(rng, numbers)
            if value.denominator == 1 and 5 < value < 50 * difficulty:
                break
        extra = [rng.randint(1, 4 + 2 * difficulty) for _ in range(max(1, 5 - used))]
        target, given = int(value), sorted(numbers + extra)
        data = {"numbers": given, "target": target, "must_use_all": False, "least": used}
        question = (
            f"Make {target} from the numbers {', '.join(map(str, given))}: use at least {used} of "
            "them, each at most as often as it is listed, with +, -, *, / and brackets. Answer "
            "with "
            "the expression only."
        )
        return Puzzle(question, expression, data)

    def check(self, data: dict[str, Any], answer: str) -> None:
        """As many numbers as asked."""
        super().check(data, answer)
        if len(evaluate(answer.split("=")[0])[1]) < data["least"]:
            raise WrongAnswer("too_few_numbers")


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """Value of an expression of integers, + - * / and brackets, and the integers it uses.

    A recursive-descent parser; nothing is executed.

    Raises:
        WrongAnswer: It is no such expression, or divides by zero.
    """
    text = text.replace("×", "*").replace("÷", "/").replace("−", "-").replace("x", "*")
    tokens = re.findall(r"[0-9]{1,6}|[-+*/()]|\S", text)
    if len(tokens) > 60:
        raise WrongAnswer("malformed")
    parser = _Parser(tokens)
    value = parser.sum()
    if parser.position != len(tokens):
        raise WrongAnswer("malformed")
    return value, parser.numbers


class _Parser:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.position = tokens, 0
        self.numbers: list[int] = []

    def sum(self) -> Fraction:
        value = self._product()
        while self._next() in ("+", "-"):
            sign = 1 if self._take() == "+" else -1
            value += sign * self._product()
        return value

    def _product(self) -> Fraction:
        value = self._atom()
        while self._next() in ("*", "/"):
            if self._take() == "*":
                value *= self._atom()
            elif (divisor := self._atom()) == 0:
                raise WrongAnswer("division_by_zero")
            else:
                value /= divisor
        return value

    def _atom(self) -> Fraction:
        token = self._take()
        if token == "(":
            value = self.sum()
            if self._take() != ")":
                raise WrongAnswer("malformed")
            return value
        if not token.isdigit() or not token.isascii():
            raise WrongAnswer("malformed")
        self.numbers.append(int(token))
        return Fraction(int(token))

    def _next(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def _take(self) -> str:
        token = self._next()
        self.position += 1
        return token


def _combined(rng: Random, numbers: list[int]) -> tuple[str, Fraction]:
    """A random expression over all numbers, fully bracketed, and its value."""
    parts = [(str(n), Fraction(n)) for n in numbers]
    while len(parts) > 1:
        (a, x), (b, y) = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        kind = rng.choice("++-**/" if y else "++-**")
        value = {"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else x}[kind]
        parts.append((f"({a} {kind} {b})", value))
    expression, value = parts[0]
    return expression.removeprefix("(").removesuffix(")") if len(numbers) > 1 else expression, value
