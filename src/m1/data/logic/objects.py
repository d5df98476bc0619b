"""Puzzles about things: counting, properties, exchanging goods, buggy tables."""

from random import Random
from typing import Any

from m1.data.logic.base import LogicTask, Puzzle, expect_integer, expect_text

_PEOPLE = ["Ada", "Ben", "Cora", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jon"]
_FRUITS = "apple banana cherry grape lemon mango orange peach pear plum"
_ANIMALS = "cat cow dog duck goat hen horse pig rabbit sheep"
_TOOLS = "axe chisel drill file hammer knife pliers saw spanner wrench"
_KINDS = {"fruit": _FRUITS.split(), "animal": _ANIMALS.split(), "tool": _TOOLS.split()}
_COLORS = ["red", "blue", "green", "white", "black", "yellow"]
_SIZES = ["small", "medium", "large"]
_STUFF = ["wood", "glass", "metal", "paper"]


class ObjectCounting(LogicTask):
    """How many of a kind remain after a story of gains and losses."""

    name = "object_counting"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Several kinds; only one is asked for."""
        asked = rng.choice(list(_KINDS))
        items = [(kind, word) for kind, group in _KINDS.items() for word in rng.sample(group, 3)]
        counts = {word: rng.randint(2, 9) for _, word in items}
        kinds = {word: kind for kind, word in items}
        lines = [f"I have {n} {word}(s)." for word, n in counts.items()]
        steps = 2 * difficulty
        for _ in range(steps):
            word = rng.choice(list(counts))
            amount = rng.randint(1, 5)
            if rng.random() < 0.5 and counts[word] > amount:
                counts[word] -= amount
                lines.append(f"I give away {amount} {word}(s).")
            elif rng.random() < 0.3:
                counts[word] *= 2
                lines.append(f"My number of {word}(s) doubles.")
            else:
                counts[word] += amount
                lines.append(f"I get {amount} more {word}(s).")
        total = sum(n for word, n in counts.items() if kinds[word] == asked)
        question = (
            " ".join(lines) + f"\nHow many {asked}s do I have now? Answer with the number only."
        )
        return Puzzle(question, str(total), {"total": total, "num_lines": len(lines)})

    def check(self, data: dict[str, Any], answer: str) -> None:
        """One number."""
        expect_integer(answer, data["total"])

    def cost(self, data: dict[str, Any]) -> float:
        """Statements to follow."""
        return float(data["num_lines"])


class ObjectProperties(LogicTask):
    """Which objects have some properties after changes."""

    name = "object_properties"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Objects change color or vanish; one combination is counted."""
        count = 4 + difficulty
        things = [
            [rng.choice(_SIZES), rng.choice(_COLORS[:4]), rng.choice(_STUFF)] for _ in range(count)
        ]
        lines = [f"{i + 1}. a {' '.join(t)} box" for i, t in enumerate(things)]
        changes = []
        gone: set[int] = set()
        for _ in range(difficulty):
            index = rng.randrange(count)
            if rng.random() < 0.3:
                gone.add(index)
                changes.append(f"Box {index + 1} is taken away.")
            else:
                things[index][1] = rng.choice(_COLORS[:4])
                changes.append(f"Box {index + 1} is painted {things[index][1]}.")
        left = [t for i, t in enumerate(things) if i not in gone]
        pattern = rng.choice(things)
        total = sum(t[1] == pattern[1] or t[0] == pattern[0] for t in left)
        question = (
            "There are boxes:\n"
            + "\n".join(lines)
            + "\n"
            + " ".join(changes)
            + f"\nHow many of the boxes that are left are {pattern[1]} or {pattern[0]} (or both)? "
            "Answer with the number only."
        )
        return Puzzle(question, str(total), {"total": total, "num_lines": count + len(changes)})

    def check(self, data: dict[str, Any], answer: str) -> None:
        """One number."""
        expect_integer(answer, data["total"])

    def cost(self, data: dict[str, Any]) -> float:
        """Statements to follow."""
        return float(data["num_lines"])


class GoodsExchange(LogicTask):
    """Who holds what after a chain of exchanges."""

    name = "goods_exchange"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Exchanges named by person or by thing."""
        people = rng.sample(_PEOPLE, 3 + difficulty // 2)
        goods = rng.sample(_KINDS["tool"] + _KINDS["fruit"], len(people))
        holds = dict(zip(people, goods, strict=True))
        lines = [f"{name} has the {thing}." for name, thing in holds.items()]
        for _ in range(2 + 2 * difficulty):
            a, b = rng.sample(people, 2)
            if rng.random() < 0.5:
                lines.append(f"{a} and {b} exchange what they have.")
            else:
                lines.append(f"{a} exchanges with whoever has the {holds[b]}.")
            holds[a], holds[b] = holds[b], holds[a]
        asked = rng.choice(people)
        question = (
            "\n".join(lines) + f"\nWhat does {asked} have in the end? Answer with the thing only."
        )
        return Puzzle(question, holds[asked], {"thing": holds[asked], "num_lines": len(lines)})

    def check(self, data: dict[str, Any], answer: str) -> None:
        """One word, with or without article."""
        expect_text(answer.strip().lower().removeprefix("the "), data["thing"])

    def cost(self, data: dict[str, Any]) -> float:
        """Statements to follow."""
        return float(data["num_lines"])


class BuggyTables(LogicTask):
    """A question about a table whose corruption is described."""

    name = "buggy_tables"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Corrupt a table in a stated way; ask about the true one."""
        num_rows = 4 + difficulty
        rows: list[list[Any]] = [
            [rng.choice(_PEOPLE), rng.randint(10, 99), rng.randint(1, 9)] for _ in range(num_rows)
        ]
        bug = rng.choice(["reversed", "shifted", "plus", "negated"])
        amount = rng.randint(2, 9)
        shown, explained = _corrupted(rows, bug, amount)
        kind = rng.choice(["sum", "max", "weighted"])
        values = (
            [row[1] for row in rows if row[2] > 4] if kind == "sum" else [row[1] for row in rows]
        )
        total = {
            "sum": sum(values),
            "max": max(row[1] for row in rows) - min(row[1] for row in rows),
            "weighted": sum(row[1] * row[2] for row in rows),
        }[kind]
        asked = {
            "sum": "the sum of price over the rows whose number is above 4",
            "max": "the difference of the largest and the smallest price",
            "weighted": "the sum of price times number over all rows",
        }[kind]
        table = "\n".join(
            " | ".join(map(str, row)) for row in [["name", "price", "number"], *shown]
        )
        question = (
            f"A table was damaged: {explained}\n\n{table}\n\nIn the undamaged table, what is "
            f"{asked}"
            "? Answer with the number only."
        )
        return Puzzle(question, str(total), {"total": total, "num_cells": 3 * num_rows})

    def check(self, data: dict[str, Any], answer: str) -> None:
        """One number."""
        expect_integer(answer, data["total"])

    def cost(self, data: dict[str, Any]) -> float:
        """Cells to mend and read."""
        return float(data["num_cells"])


def _corrupted(rows: list[list[Any]], bug: str, amount: int) -> tuple[list[list[Any]], str]:
    if bug == "reversed":
        shown = [[a, int(str(b)[::-1]), c] for a, b, c in rows]
        if all(row[1] % 10 for row in rows):
            return shown, "the two digits of every price were swapped."
        bug = "plus"
    if bug == "shifted":
        prices = [row[1] for row in rows]
        moved = prices[-1:] + prices[:-1]
        shown = [[a, price, c] for (a, _, c), price in zip(rows, moved, strict=True)]
        return shown, "every price slid down one row, and the last one went to the first row."
    if bug == "negated":
        shown = [[a, 100 - b, c] for a, b, c in rows]
        return shown, "every price was replaced by 100 minus the price."
    shown = [[a, b + amount, c] for a, b, c in rows]
    return shown, f"{amount} was added to every price."
