"""Dyck languages in three forms: complete, find the first mistake, find wrong reasoning steps."""

from random import Random
from typing import Any

from m1.data.logic.base import LogicTask, Puzzle, WrongAnswer, expect_integer, integers

_PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}


class DyckLanguage(LogicTask):
    """Close what is open."""

    name = "dyck_language"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """A prefix with several open brackets."""
        length, kinds = 6 + 4 * difficulty, 2 + (difficulty > 2) + (difficulty > 5)
        while True:
            text = _prefix(rng, length, kinds)
            missing = _closing(text)
            if 2 <= len(missing) <= 4 + difficulty:
                break
        question = (
            "Complete this sequence with the fewest closing brackets so that all brackets match: "
            f"{' '.join(text)}\nAnswer with the missing brackets only, separated by spaces."
        )
        return Puzzle(question, " ".join(missing), {"text": "".join(text)})

    def check(self, data: dict[str, Any], answer: str) -> None:
        """The completion is unique."""
        if "".join(answer.split()) != _closing(data["text"]):
            raise WrongAnswer("wrong")

    def cost(self, data: dict[str, Any]) -> float:
        """Characters pushed to and popped from a stack."""
        return float(len(data["text"]))


class DyckLanguageErrors(LogicTask):
    """The position of the first mistake in a sequence of brackets."""

    name = "dyck_language_errors"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Change one bracket of a correct sequence, or none."""
        length = 6 + 4 * difficulty
        text = list(_prefix(rng, length, 3))
        text += _closing("".join(text))
        if rng.random() < 0.85:
            place = rng.randrange(len(text))
            text[place] = rng.choice([b for b in "()[]{}" if b != text[place]])
        position = first_mistake("".join(text))
        question = (
            f"Brackets, numbered from 1: {' '.join(text)}\nAt which position does the sequence "
            "first go wrong, that is, stands a closing bracket that does not match? If "
            "brackets are "
            f"left open at the end and nothing went wrong before, answer {len(text) + 1}; if "
            f"all is "
            "right, answer -1. Answer with the number only."
        )
        return Puzzle(question, str(position), {"text": "".join(text)})

    def check(self, data: dict[str, Any], answer: str) -> None:
        """One number."""
        expect_integer(answer, first_mistake(data["text"]))

    def cost(self, data: dict[str, Any]) -> float:
        """Characters."""
        return float(len(data["text"]))


class DyckLanguageReasoningErrors(LogicTask):
    """Which steps of a worked stack trace are wrong."""

    name = "dyck_language_reasoning_errors"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Write the stack after each bracket, and spoil some of the lines."""
        length = 5 + 2 * difficulty
        text = "".join(_prefix(rng, length, 3))
        wrong = sorted(rng.sample(range(1, length + 1), rng.randint(1, 1 + difficulty // 3)))
        lines, stack = [], ""
        for number, bracket in enumerate(text, start=1):
            stack = stack + bracket if bracket in _PAIRS else stack[:-1]
            shown = _spoiled(rng, stack) if number in wrong else stack
            lines.append(f"Step {number}: read {bracket} ; stack: {' '.join(shown) or 'empty'}")
        question = (
            f"A stack of open brackets is kept while reading {' '.join(text)}\nEvery line "
            f"shows the "
            "stack that is right after its bracket, apart from some mistakes; a mistake does not "
            "carry on to later lines.\n\n"
            + "\n".join(lines)
            + "\n\nWhich steps show a wrong stack? "
            "Answer with their numbers, separated by commas."
        )
        return Puzzle(question, ",".join(map(str, wrong)), {"wrong": wrong, "length": length})

    def check(self, data: dict[str, Any], answer: str) -> None:
        """The set of steps."""
        numbers = integers(answer)
        if len(set(numbers)) != len(numbers) or sorted(numbers) != data["wrong"]:
            raise WrongAnswer("wrong")

    def cost(self, data: dict[str, Any]) -> float:
        """Lines."""
        return float(data["length"])


def first_mistake(text: str) -> int:
    """1-based position of the first mismatch; len + 1 when something stays open; else -1."""
    stack: list[str] = []
    for position, bracket in enumerate(text, start=1):
        if bracket in _PAIRS:
            stack.append(bracket)
        elif not stack or _PAIRS[stack.pop()] != bracket:
            return position
    return len(text) + 1 if stack else -1


def _prefix(rng: Random, length: int, kinds: int) -> str:
    opening = list(_PAIRS)[:kinds]
    text, stack = "", ""
    for _ in range(length):
        if stack and rng.random() < 0.45:
            text, stack = text + _PAIRS[stack[-1]], stack[:-1]
        else:
            bracket = rng.choice(opening)
            text, stack = text + bracket, stack + bracket
    return text


def _closing(text: str) -> str:
    stack: list[str] = []
    for bracket in text:
        if bracket in _PAIRS:
            stack.append(bracket)
        else:
            stack.pop()
    return "".join(_PAIRS[bracket] for bracket in reversed(stack))


def _spoiled(rng: Random, stack: str) -> str:
    choices = [stack + rng.choice("([{")]
    if stack:
        choices.append(stack[:-1])
        choices.append(stack[:-1] + rng.choice([b for b in "([{" if b != stack[-1]]))
    return rng.choice(choices)
