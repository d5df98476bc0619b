"""Puzzles on Latin squares: sudoku, futoshiki, skyscrapers, calcudoku."""

from collections.abc import Sequence
from math import prod
from random import Random
from typing import Any

from m1.data.logic.base import Puzzle, show
from m1.data.logic.cells import CellsTask, neighbours, rows_and_columns
from m1.data.logic.constraints import AllDifferent, Condition, Problem


def latin_square(rng: Random, size: int) -> list[int]:
    """A shuffled Latin square of 1 to `size`, row by row."""
    rows, columns, names = (rng.sample(range(size), size) for _ in range(3))
    return [names[(r + c) % size] + 1 for r in rows for c in columns]


def latin_problem(size: int, givens: Sequence[int]) -> Problem:
    """Rows and columns all different; 0 marks an open cell."""
    everything = tuple(range(1, size + 1))
    domains = [(given,) if given else everything for given in givens]
    return Problem(domains, [AllDifferent(line) for line in rows_and_columns(size)])


def with_holes(rng: Random, values: Sequence[int], num_holes: int) -> list[int]:
    """The values with some replaced by 0."""
    holes = set(rng.sample(range(len(values)), num_holes))
    return [0 if i in holes else value for i, value in enumerate(values)]


def _shown(givens: Sequence[int], size: int) -> str:
    cells = [str(value) if value else "_" for value in givens]
    return show([cells[i : i + size] for i in range(0, len(cells), size)])


class _LatinTask(CellsTask):
    def shape(self, data: dict[str, Any]) -> tuple[int, int]:
        """A square."""
        return data["size"], data["size"]

    def _holes(self, size: int, difficulty: int, most: float) -> int:
        return round(size * size * (0.3 + (most - 0.3) * difficulty / 10))


class Sudoku(_LatinTask):
    """Boxes, rows and columns hold each digit once: 4x4, 6x6, then 9x9."""

    name = "sudoku"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Shuffle a pattern, remove cells."""
        height, width = (2, 2) if difficulty <= 2 else (2, 3) if difficulty <= 4 else (3, 3)
        size = height * width
        bands = rng.sample(range(width), width)
        stacks = rng.sample(range(height), height)
        rows = [b * height + r for b in bands for r in rng.sample(range(height), height)]
        columns = [s * width + c for s in stacks for c in rng.sample(range(width), width)]
        names = rng.sample(range(1, size + 1), size)
        values = [
            names[(width * (r % height) + r // height + c) % size] for r in rows for c in columns
        ]
        givens = with_holes(rng, values, self._holes(size, difficulty, 0.7))
        data = {"size": size, "height": height, "width": width, "givens": givens}
        question = (
            f"Fill this {size}x{size} sudoku so that every row, every column and every box of "
            f"{height} rows by {width} columns holds each number from 1 to {size} once. Empty "
            f"cells are _.\n\n{_shown(givens, size)}\n\nAnswer with the {size} filled rows, "
            f"numbers "
            "separated by spaces."
        )
        return Puzzle(question, self.written(data, values), data)

    def problem(self, data: dict[str, Any]) -> Problem:
        """Latin, and boxes."""
        size, height, width = data["size"], data["height"], data["width"]
        problem = latin_problem(size, data["givens"])
        for top in range(0, size, height):
            for left in range(0, size, width):
                box = tuple(
                    (top + r) * size + left + c for r in range(height) for c in range(width)
                )
                problem.constraints.append(AllDifferent(box))
        return problem


class Futoshiki(_LatinTask):
    """A Latin square with signs between neighbours."""

    name = "futoshiki"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Signs are drawn from the solution."""
        size = 4 + difficulty // 3
        values = latin_square(rng, size)
        givens = with_holes(rng, values, self._holes(size, difficulty, 0.95))
        pairs = [
            (a, b)
            for a in range(size * size)
            for b in neighbours(a, size, size, diagonal=False)
            if values[a] < values[b]
        ]
        less = sorted(rng.sample(pairs, size + difficulty))
        data = {"size": size, "givens": givens, "less": [list(pair) for pair in less]}
        lines = "\n".join(f"{_place(a, size)} < {_place(b, size)}" for a, b in less)
        question = (
            f"Fill the {size}x{size} grid so that every row and every column holds each number "
            f"from "
            f"1 to {size} once and all the inequalities hold. R1C2 is row 1, column 2; _ is empty."
            f"\n\n{_shown(givens, size)}\n\n{lines}\n\nAnswer with the {size} rows, numbers "
            "separated by spaces."
        )
        return Puzzle(question, self.written(data, values), data)

    def problem(self, data: dict[str, Any]) -> Problem:
        """Latin, and the signs."""
        problem = latin_problem(data["size"], data["givens"])
        for a, b in data["less"]:
            problem.constraints.append(Condition((a, b), lambda pair: pair[0] < pair[1]))
        return problem


class Skyscrapers(_LatinTask):
    """A Latin square of heights; numbers at the edge count what is visible."""

    name = "skyscrapers"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """All edges are given; some cells too when it is easy."""
        size = 4 + difficulty // 4
        values = latin_square(rng, size)
        givens = with_holes(rng, values, self._holes(size, difficulty, 1.0))
        lines = rows_and_columns(size)
        clues = [
            [_visible([values[i] for i in line]), _visible([values[i] for i in reversed(line)])]
            for line in lines
        ]
        data = {"size": size, "givens": givens, "clues": clues}
        top = " ".join(str(clue[0]) for clue in clues[size:])
        bottom = " ".join(str(clue[1]) for clue in clues[size:])
        rows = _shown(givens, size).splitlines()
        middle = "\n".join(
            f"{clue[0]} | {row} | {clue[1]}" for clue, row in zip(clues, rows, strict=False)
        )
        question = (
            f"Place buildings of heights 1 to {size} so that each height stands once in every row "
            "and column. The numbers outside say how many buildings are seen from there; a "
            "building "
            f"hides all lower ones behind it. _ is empty.\n\n    {top}\n{middle}\n    {bottom}\n\n"
            f"Answer with the {size} rows of heights only, separated by spaces."
        )
        return Puzzle(question, self.written(data, values), data)

    def problem(self, data: dict[str, Any]) -> Problem:
        """Latin, and the views from both ends of every line."""
        size = data["size"]
        problem = latin_problem(size, data["givens"])
        for line, (near, far) in zip(rows_and_columns(size), data["clues"], strict=True):
            problem.constraints.append(_View(line, near))
            problem.constraints.append(_View(tuple(reversed(line)), far))
        return problem


class Calcudoku(_LatinTask):
    """A Latin square with cages whose numbers give a sum or a product."""

    name = "calcudoku"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Cages grow at random."""
        size = 3 + (difficulty + 2) // 4
        values = latin_square(rng, size)
        cages: list[dict[str, Any]] = []
        for cells in _regions(rng, size, 1 + min(3, 1 + difficulty // 2)):
            kind = rng.choice("+*") if len(cells) > 1 else "="
            numbers = [values[i] for i in cells]
            target = prod(numbers) if kind == "*" else sum(numbers)
            cages.append({"cells": cells, "kind": kind, "target": target})
        data = {"size": size, "cages": cages}
        lines = "\n".join(
            f"{cage['target']}{cage['kind']}: " + ", ".join(_place(i, size) for i in cage["cells"])
            for cage in cages
        )
        question = (
            f"Fill a {size}x{size} grid so that every row and column holds each number from 1 to "
            f"{size} once. In each cage the numbers must add (+) or multiply (*) to the target; = "
            f"names a single cell. R1C2 is row 1, column 2.\n\n{lines}\n\nAnswer with the {size} "
            "rows, numbers separated by spaces."
        )
        return Puzzle(question, self.written(data, values), data)

    def problem(self, data: dict[str, Any]) -> Problem:
        """Latin, and the cages."""
        size = data["size"]
        problem = latin_problem(size, [0] * size * size)
        for cage in data["cages"]:
            combine: Any = prod if cage["kind"] == "*" else sum
            problem.constraints.append(_Cage(tuple(cage["cells"]), cage["target"], combine))
        return problem


class _Cage(Condition):
    """A sum or product of positive numbers."""

    def __init__(self, scope: tuple[int, ...], target: int, combine: Any) -> None:
        super().__init__(scope, lambda values: combine(values) == target)


class _View(Condition):
    """How many of a line are seen from its first cell."""

    def __init__(self, scope: tuple[int, ...], count: int) -> None:
        super().__init__(scope, lambda values: _visible(values) == count)


def _visible(heights: Sequence[int]) -> int:
    highest = seen = 0
    for height in heights:
        if height > highest:
            highest, seen = height, seen + 1
    return seen


def _regions(rng: Random, size: int, most: int) -> list[list[int]]:
    """The grid cut into connected regions of at most `most` cells."""
    free = set(range(size * size))
    regions = []
    for start in rng.sample(range(size * size), size * size):
        if start not in free:
            continue
        region = [start]
        free.discard(start)
        while len(region) < most:
            near = sorted(
                {n for cell in region for n in neighbours(cell, size, size, diagonal=False)} & free
            )
            if not near:
                break
            region.append(chosen := rng.choice(near))
            free.discard(chosen)
        regions.append(sorted(region))
    return sorted(regions)


def _place(cell: int, size: int) -> str:
    return f"R{cell // size + 1}C{cell % size + 1}"
