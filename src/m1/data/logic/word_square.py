"""Word squares."""

from random import Random
from typing import Any

from m1.data.logic.base import LogicTask, Puzzle, WrongAnswer

_SQUARES = {
    3: ["bit ice ten", "sat ago tow", "cat ape ten", "pea era ale", "hot ore ten", "bat are ten",
        "man are net", "tap are pea", "lap are pen", "dab ace beg"],
    4: ["card area rear dart", "cube upon bore ends", "ring idea need gads", "list idea seed tads",
        "crab race aces best", "made aver dene erne", "land aloe node deep", "song over near germ",
        "lane area near ears", "them hide eden mend"],
}  # fmt: skip
_FILLERS = {
    3: "cup dog sun run fog gem hat jam key lid mud nut owl pig rug",
    4: "bird cold dusk fern gift hawk iron joke kite lamp milk note pond quiz rope",
}


class WordSquare(LogicTask):
    """Rows of letters whose columns spell the same words."""

    name = "word_square"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Hide letters of a known square; the words are given, shuffled."""
        size = 3 if difficulty <= 3 else 4
        square = rng.choice(_squares(size))
        words = [*square]
        distractors = rng.sample([w for w in _square_words(size) if w not in words], difficulty)
        listed = sorted(words + distractors)
        data = {"size": size, "words": listed, "first": square[0][: max(0, 3 - difficulty)]}
        hint = f" The first row begins with {data['first']}." if data["first"] else ""
        question = (
            f"Choose {size} of these words and write them one below the other so that the columns, "
            f"read downwards, spell the same {size} words in the same order: {', '.join(listed)}."
            f"{hint} Answer with the {size} words, one a line."
        )
        return Puzzle(question, "\n".join(square), data)

    def check(self, data: dict[str, Any], answer: str) -> None:
        """Words of the list, symmetric."""
        rows = [line.strip().lower() for line in answer.splitlines() if line.strip()]
        if len(rows) != data["size"] or any(row not in data["words"] for row in rows):
            raise WrongAnswer("malformed")
        if ["".join(column) for column in zip(*rows, strict=True)] != rows:
            raise WrongAnswer("not_square")
        if not rows[0].startswith(data["first"]) or len(set(rows)) < len(rows):
            raise WrongAnswer("other_words")

    def cost(self, data: dict[str, Any]) -> float:
        """Ordered choices of words."""
        count, result = len(data["words"]), 1
        for taken in range(data["size"]):
            result *= count - taken
        return float(result)


def _squares(size: int) -> list[list[str]]:
    found = [text.split() for text in _SQUARES[size]]
    return [rows for rows in found if _is_square(rows)]


def _is_square(rows: list[str]) -> bool:
    return ["".join(column) for column in zip(*rows, strict=True)] == rows


def _square_words(size: int) -> list[str]:
    own = {word for rows in _squares(size) for word in rows}
    return sorted(own | set(_FILLERS[size].split()))
