"""What every logic task is: a generator of puzzles and a judge of answers (paper sec. 4.1)."""

import hashlib
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar

from m1.types import M1Error, Task, Verdict

MAX_DIFFICULTY = 10
MAX_ANSWER_CHARACTERS = 20_000
_FENCE = re.compile(r"```[a-z]*\n?(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Puzzle:
    """One drawn instance."""

    question: str
    """All a solver needs, the form of the answer included."""
    solution: str
    """One right answer."""
    data: dict[str, Any] = field(default_factory=dict)
    """What judging needs, in JSON's types; never shown."""


class WrongAnswer(Exception):
    """Why an answer is not right; the first argument is a short name."""


class LogicTask(ABC):
    """A family of puzzles with one parameter of difficulty, 1 to 10."""

    name: ClassVar[str]

    @abstractmethod
    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Draw a puzzle; the same state of `rng` gives the same one."""

    @abstractmethod
    def check(self, data: dict[str, Any], answer: str) -> None:
        """Raise `WrongAnswer` unless the answer solves the puzzle, in whatever valid way.

        Args:
            data: The puzzle's data, possibly after a trip through JSON.
            answer: Stripped text, not empty, of bounded length. Never evaluated.
        """

    @abstractmethod
    def cost(self, data: dict[str, Any]) -> float:
        """Steps that a simple solver needs: search nodes, operations or statements to follow."""

    def generate(self, seed: int, difficulty: int) -> Task:
        """The task of a seed and a difficulty; equal arguments give equal tasks."""
        if not 1 <= difficulty <= MAX_DIFFICULTY:
            raise M1Error(
                f"logic task {self.name}: difficulty {difficulty} must lie in 1 to {MAX_DIFFICULTY}"
            )
        puzzle = self.draw(Random(f"{self.name}:{seed}:{difficulty}"), difficulty)
        digest = hashlib.sha256(puzzle.question.encode()).hexdigest()[:12]
        return Task(
            task_id=f"{self.name}-{digest}",
            source=f"logic/{self.name}",
            prompt=puzzle.question,
            reference=puzzle.solution,
            verifier=f"logic:{self.name}",
            metadata=puzzle.data,
            domain="logic",
            difficulty=float(difficulty),
        )

    def verify(self, task: Task, answer: str) -> Verdict:
        """Whether an answer, without thinking and tags, solves the task."""
        fenced = _FENCE.findall(answer[-MAX_ANSWER_CHARACTERS:])
        text = (fenced[-1] if fenced else answer).strip()
        if not text:
            return Verdict(0.0, "no_answer")
        if len(text) > MAX_ANSWER_CHARACTERS:
            return Verdict(0.0, "too_long")
        try:
            self.check(task.metadata, text)
        except WrongAnswer as error:
            return Verdict(0.0, str(error))
        return Verdict(1.0, "right")


def expect_text(answer: str, expected: str) -> None:
    """Raise unless the answer is the expected text, case, spaces and final marks aside."""
    if _plain(answer) != _plain(expected):
        raise WrongAnswer("wrong")


def expect_integer(answer: str, expected: int) -> None:
    """Raise unless the answer is the integer."""
    if integer(answer) != expected:
        raise WrongAnswer("wrong")


def integer(text: str) -> int:
    """A plain ASCII integer of at most 18 digits."""
    match = re.fullmatch(r"\s*([+-]?[0-9]{1,18})\s*\.?\s*", text)
    if match is None:
        raise WrongAnswer("malformed")
    return int(match[1])


def grid(answer: str, num_rows: int, num_columns: int) -> list[list[str]]:
    """Rows of cells separated by spaces, commas or bars."""
    lines = [line for line in answer.splitlines() if line.strip()]
    if len(lines) != num_rows:
        raise WrongAnswer("malformed")
    rows = [re.split(r"[\s,|]+", line.strip(" \t|,[]")) for line in lines]
    if any(len(row) != num_columns for row in rows):
        raise WrongAnswer("malformed")
    return rows


def words(answer: str) -> list[str]:
    """Words separated by spaces or commas."""
    return [word for word in re.split(r"[\s,]+", answer.strip().rstrip(".")) if word]


def integers(answer: str) -> list[int]:
    """Integers separated by spaces or commas."""
    return [integer(word) for word in words(answer.strip("[]() "))]


def show(rows: list[list[Any]]) -> str:
    """A grid as text, cells separated by spaces."""
    return "\n".join(" ".join(str(cell) for cell in row) for row in rows)


def _plain(text: str) -> str:
    return " ".join(text.lower().strip().rstrip(".").split())
