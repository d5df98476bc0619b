"""Puzzles of letters and words: ciphers, sorting, sorting mistakes, transformations of grids."""

from random import Random
from typing import Any

from m1.data.logic.base import (
    LogicTask,
    Puzzle,
    WrongAnswer,
    expect_integer,
    expect_text,
    grid,
    show,
    words,
)  # fmt: skip

_WORDS_TEXT = (
    "able acid aged also area army away baby back ball band bank base bath bear beat been "
    "beer bell belt best bird blow blue boat body bomb bond bone book boom born boss both "
    "bowl bulk burn bush busy calm came camp card care case cash cast cell chat chip city "
    "club coal coat code cold come cook cool copy core cost crew crop dark data date dawn "
    "days dead deal dean dear debt deep deny desk dial diet disc disk does done door dose "
    "down draw drew drop drug dual duke dust duty each earn ease east easy edge else even "
    "ever evil exit face fact fail fair fall farm fast fate fear feed feel feet fell felt "
    "file fill film find fine fire firm "
)
_WORDS = _WORDS_TEXT.split()
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"


class Cipher(LogicTask):
    """Decrypt a text whose rule is described; harder ones compose several."""

    name = "cipher"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Compose one to four reversible steps."""
        plain = " ".join(rng.sample(_WORDS, 2 + difficulty // 2))
        steps = []
        for _ in range(1 + difficulty // 3):
            kind = rng.choice(["shift", "mirror", "reverse", "keyword", "rotate"])
            key: Any = rng.randint(1, 25) if kind in ("shift", "rotate") else None
            if kind == "keyword":
                key = "".join(rng.sample(_ALPHABET, 26))
            steps.append([kind, key])
        text = plain
        for kind, key in steps:
            text = _encrypt(text, kind, key)
        lines = "\n".join(f"{i}. {_rule(*step)}" for i, step in enumerate(steps, start=1))
        question = (
            f"A text was encrypted by these steps, one after the other:\n{lines}\n\nThe result is: "
            f"{text}\nWhat was the text? Answer with it only."
        )
        return Puzzle(question, plain, {"plain": plain, "num_steps": len(steps)})

    def check(self, data: dict[str, Any], answer: str) -> None:
        """The text."""
        expect_text(answer, data["plain"])

    def cost(self, data: dict[str, Any]) -> float:
        """Letters times steps."""
        return float(len(data["plain"]) * data["num_steps"])


class WordSorting(LogicTask):
    """Sort words by a given alphabet."""

    name = "word_sorting"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """From three levels on, some letters change their place in the alphabet."""
        chosen = rng.sample(_WORDS, 4 + 2 * difficulty)
        alphabet = list(_ALPHABET)
        for letter in rng.sample(_ALPHABET, max(0, (difficulty - 1) // 2)):
            alphabet.remove(letter)
            alphabet.insert(rng.choice([0, len(alphabet)]), letter)
        order = "".join(alphabet)
        data = {"words": chosen, "order": order}
        question = (
            f"Sort these words by the alphabet {order}: {', '.join(chosen)}. Answer with the words "
            "in order, separated by spaces."
        )
        return Puzzle(question, " ".join(_sorted(chosen, order)), data)

    def check(self, data: dict[str, Any], answer: str) -> None:
        """The one order."""
        if [word.lower() for word in words(answer)] != _sorted(data["words"], data["order"]):
            raise WrongAnswer("wrong")

    def cost(self, data: dict[str, Any]) -> float:
        """Pairs to compare."""
        return float(len(data["words"]) ** 2)


class WordSortingMistake(LogicTask):
    """The first wrong step of an insertion sort."""

    name = "word_sorting_mistake"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Write the list after each insertion; from some step on it is wrong, or nowhere."""
        chosen = rng.sample(_WORDS, 4 + difficulty)
        lines, mistake = [], -1
        wrong_at = rng.randint(2, len(chosen)) if rng.random() < 0.85 else 0
        for number in range(1, len(chosen) + 1):
            done = sorted(chosen[:number])
            if number == wrong_at:
                i, j = rng.sample(range(number), 2)
                done[i], done[j] = done[j], done[i]
                mistake = number
            lines.append(f"Step {number}: insert {chosen[number - 1]} -> {' '.join(done)}")
        question = (
            "Words are inserted one by one into a list that is kept in alphabetical order:\n"
            + "\n".join(lines)
            + "\nWhich step shows a wrong list? Answer with its number, or -1 if none does."
        )
        return Puzzle(question, str(mistake), {"mistake": mistake, "num_steps": len(lines)})

    def check(self, data: dict[str, Any], answer: str) -> None:
        """One number."""
        expect_integer(answer, data["mistake"])

    def cost(self, data: dict[str, Any]) -> float:
        """Words in all lists."""
        return float(data["num_steps"] * (data["num_steps"] + 1) // 2)


class ArcGrids(LogicTask):
    """Find the rule of example grids and apply it."""

    name = "arc_grids"
    _rules = ("flip_rows", "flip_columns", "rotate", "transpose", "recolor", "shift", "border")

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """One to three rules in sequence, three examples."""
        rules = [
            [rng.choice(self._rules), rng.randint(1, 4), rng.randint(5, 9)]
            for _ in range(1 + difficulty // 4)
        ]
        size = 3 + difficulty // 3
        grids = [
            [[rng.choice([0, 0, 1, 2, 3, 4]) for _ in range(size)] for _ in range(size)]
            for _ in range(4)
        ]
        results = [_transformed(rows, rules) for rows in grids]
        examples = "\n\n".join(
            f"Input:\n{show(a)}\nOutput:\n{show(b)}"
            for a, b in zip(grids[:3], results, strict=False)
        )
        question = (
            f"Find the rule that turns each input into its output.\n\n{examples}\n\nApply it to:\n"
            f"{show(grids[3])}\n\nAnswer with the output grid, numbers separated by spaces."
        )
        return Puzzle(question, show(results[3]), {"result": results[3], "num_rules": len(rules)})

    def check(self, data: dict[str, Any], answer: str) -> None:
        """Every cell."""
        expected = data["result"]
        rows = grid(answer, len(expected), len(expected[0]))
        if rows != [[str(cell) for cell in row] for row in expected]:
            raise WrongAnswer("wrong")

    def cost(self, data: dict[str, Any]) -> float:
        """Sequences of rules, times the cells to compare."""
        return float(len(self._rules) ** data["num_rules"] * len(data["result"]) ** 2)


def _encrypt(text: str, kind: str, key: Any) -> str:
    if kind == "reverse":
        return " ".join(word[::-1] for word in text.split())
    if kind == "rotate":
        parts = text.split()
        return " ".join(parts[key % len(parts) :] + parts[: key % len(parts)])
    target = {
        "shift": _ALPHABET[(key or 0) % 26 :] + _ALPHABET[: (key or 0) % 26]
        if kind == "shift"
        else "",
        "mirror": _ALPHABET[::-1],
        "keyword": key,
    }[kind]
    return text.translate(str.maketrans(_ALPHABET, target))


def _rule(kind: str, key: Any) -> str:
    return {
        "shift": f"Each letter moves {key} places forward in the alphabet, z to a.",
        "mirror": "a becomes z, b becomes y, and so on.",
        "reverse": "Each word is written backwards.",
        "rotate": f"The first word moves to the end, {key} times.",
        "keyword": f"The letters a to z become {key}, in this order.",
    }[kind]


def _sorted(chosen: list[str], order: str) -> list[str]:
    return sorted(chosen, key=lambda word: [order.index(letter) for letter in word])


def _transformed(rows: list[list[int]], rules: list[list[Any]]) -> list[list[int]]:
    for rule, a, b in rules:
        if rule == "flip_rows":
            rows = rows[::-1]
        elif rule == "flip_columns":
            rows = [row[::-1] for row in rows]
        elif rule == "rotate":
            rows = [list(row) for row in zip(*rows[::-1], strict=True)]
        elif rule == "transpose":
            rows = [list(row) for row in zip(*rows, strict=True)]
        elif rule == "recolor":
            rows = [[b if cell == a else cell for cell in row] for row in rows]
        elif rule == "shift":
            rows = rows[-1:] + rows[:-1]
        else:
            last = len(rows) - 1
            rows = [
                [b if 0 in (r, c) or last in (r, c) else cell for c, cell in enumerate(row)]
                for r, row in enumerate(rows)
            ]
    return [list(row) for row in rows]
