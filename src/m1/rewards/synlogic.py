"""The verifier `synlogic:<task>`: SynLogic's layouts of answers, judged by our logic tasks.

Its prompts ask for a grid as nested lists or tuples (`[[1, 2], [2, 1]]`), for rows between commas
in one pair of double brackets (`[[1 2,2 1]]`), or for stars by region (`{"A": [(1, 2)]}`). They are
read as text; nothing is evaluated.
"""

import re

from m1.data.logic.base import MAX_ANSWER_CHARACTERS
from m1.data.logic.catalogue import logic_task
from m1.rewards.answers import final_text
from m1.types import Task, Verdict

_INNER = re.compile(r"[\[(]([^\[\]()]*)[\])]")
_NESTED = re.compile(r"[\[(]\s*(?:[\[(][^\[\]()]*[\])][\s,]*)+[\])]")
_STARS = re.compile(r"\{[^{}]*\}")
_PAIR = re.compile(
    r"\(\s*([0-9]{1,3})\s*,\s*([0-9]{1,3})\s*\)|\[\s*([0-9]{1,3})\s*,\s*([0-9]{1,3})\s*\]"
)
_KAKURASU = {"1": "X", "X": "."}


def verify(task: Task, completion: str) -> Verdict:
    """Whether the last grid of the final text solves the puzzle in any valid way."""
    name = task.verifier.partition(":")[2]
    judge = logic_task(name)
    text = final_text(completion)
    if text is None or not text.strip():
        return Verdict(0.0, "no_answer")
    text = text[-MAX_ANSWER_CHARACTERS:]
    size = int(task.metadata["size"])
    rows = _stars(text, size) if name == "star_placement" else _rows(text)
    if name == "kakurasu" and rows is not None:
        marks = {cell for row in rows for cell in row}
        rows = [[_KAKURASU[c] for c in row] for row in rows] if marks <= set(_KAKURASU) else None
    if rows is None:
        return Verdict(0.0, "no_grid")
    return judge.verify(task, "\n".join(" ".join(row) for row in rows))


def _rows(text: str) -> list[list[str]] | None:
    """Cells of the last nested list, without quotes."""
    found = _NESTED.findall(text)
    if not found:
        return None
    inner = _INNER.findall(found[-1])
    if len(inner) == 1:
        inner = inner[0].split(",")
    rows = [
        re.split(r"[,\s]+", row.replace('"', " ").replace("'", " ").strip(", \n\t"))
        for row in inner
    ]
    return [row for row in rows if row != [""]]


def _stars(text: str, size: int) -> list[list[str]] | None:
    """The grid of the coordinates, from 1, in the last braces."""
    found = _STARS.findall(text)
    if not found:
        return None
    rows = [["."] * size for _ in range(size)]
    for pair in _PAIR.findall(found[-1]):
        row, column = (int(number) for number in pair if number)
        if not (1 <= row <= size and 1 <= column <= size):
            return None
        rows[row - 1][column - 1] = "*"
    return rows
