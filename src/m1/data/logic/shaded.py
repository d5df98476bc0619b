"""Puzzles whose answer marks cells: kakurasu, minesweeper, binary puzzle."""

from collections.abc import Sequence
from random import Random
from typing import Any

from m1.data.logic.base import Puzzle, show
from m1.data.logic.cells import CellsTask, neighbours, rows_and_columns
from m1.data.logic.constraints import Condition, Problem, Search, WeightedSum


def exactly(cells: Sequence[int], count: int) -> WeightedSum:
    """As many marked cells as `count`."""
    return WeightedSum(tuple(cells), count, 0, 1)


def at_most_one(cells: Sequence[int]) -> Condition:
    """No two of the cells marked."""
    return Condition(tuple(cells), lambda values: sum(values) <= 1)


class SquareTask(CellsTask):
    """A square grid."""

    def shape(self, data: dict[str, Any]) -> tuple[int, int]:
        """A square."""
        return data["size"], data["size"]


class Kakurasu(SquareTask):
    """Marked cells weigh their position; rows and columns have given weights."""

    name = "kakurasu"
    symbols = ".X"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """A random marking gives the sums."""
        size = 3 + difficulty // 2
        values = [int(rng.random() < 0.5) for _ in range(size * size)]
        lines = rows_and_columns(size)
        sums = [sum((k + 1) * values[i] for k, i in enumerate(line)) for line in lines]
        data = {"size": size, "sums": sums}
        question = (
            f"Mark cells of a {size}x{size} grid. A marked cell adds its column number to its "
            f"row's "
            f"sum and its row number to its column's sum (both from 1).\nRow sums, top to bottom: "
            f"{sums[:size]}\nColumn sums, left to right: {sums[size:]}\nAnswer with {size} rows of "
            "X (marked) and . (not marked), separated by spaces."
        )
        return Puzzle(question, self.written(data, values), data)

    def problem(self, data: dict[str, Any]) -> Problem:
        """A weighted sum for each line."""
        size = data["size"]
        weights = tuple(range(1, size + 1))
        return Problem(
            [(0, 1)] * size**2,
            [
                WeightedSum(line, total, 0, 1, weights)
                for line, total in zip(rows_and_columns(size), data["sums"], strict=True)
            ],
        )


class Minesweeper(SquareTask):
    """Find all mines from the numbers of the open cells."""

    name = "minesweeper"
    symbols = ".*"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Random mines; some of the safe cells are open."""
        size = 4 + difficulty // 2
        mines = set(rng.sample(range(size**2), round(size**2 * (0.12 + 0.01 * difficulty))))
        safe = sorted(set(range(size**2)) - mines)
        shown = sorted(rng.sample(safe, round(len(safe) * (0.85 - 0.035 * difficulty))))
        clues = [
            [i, sum(n in mines for n in neighbours(i, size, size, diagonal=True))] for i in shown
        ]
        data = {"size": size, "clues": clues, "num_mines": len(mines)}
        numbers = {cell: count for cell, count in clues}
        picture = show([[numbers.get(r * size + c, "?") for c in range(size)] for r in range(size)])
        values = [int(i in mines) for i in range(size**2)]
        question = (
            f"A minefield has {len(mines)} mines, all under ? cells. A number counts the mines in "
            f"the eight cells around it.\n\n{picture}\n\nMark all mines: answer with {size} "
            f"rows of "
            "* (mine) and . (no mine), separated by spaces."
        )
        return Puzzle(question, self.written(data, values), data)

    def problem(self, data: dict[str, Any]) -> Problem:
        """A sum for each number, and the total."""
        size, clues = data["size"], {cell: count for cell, count in data["clues"]}
        domains: list[tuple[int, ...]] = [(0,) if i in clues else (0, 1) for i in range(size**2)]
        problem = Problem(domains, [exactly(range(size**2), data["num_mines"])])
        for cell, count in clues.items():
            near = neighbours(cell, size, size, diagonal=True)
            problem.constraints.append(exactly(near, count))
        return problem


class BinaryPuzzle(SquareTask):
    """Zeros and ones: never three in a row, as many of each in every line."""

    name = "binary_puzzle"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Rows are drawn until columns fit, then cells removed."""
        size = 4 if difficulty <= 3 else 6
        values = _balanced(rng, size)
        num_holes = round(size**2 * (0.35 + 0.04 * difficulty))
        holes = set(rng.sample(range(size**2), num_holes))
        givens = [-1 if i in holes else v for i, v in enumerate(values)]
        data = {"size": size, "givens": givens}
        picture = show(
            [
                ["_" if givens[r * size + c] < 0 else givens[r * size + c] for c in range(size)]
                for r in range(size)
            ]
        )
        question = (
            f"Fill the empty cells (_) of this {size}x{size} grid with 0 and 1 so that every "
            f"row and"
            " every column holds as many 0 as 1 and never three equal digits side by side.\n\n"
            f"{picture}\n\nAnswer with the {size} rows, digits separated by spaces."
        )
        return Puzzle(question, self.written(data, values), data)

    def problem(self, data: dict[str, Any]) -> Problem:
        """Balance, and no three alike."""
        size = data["size"]
        problem = Problem([(0, 1) if given < 0 else (given,) for given in data["givens"]])
        for line in rows_and_columns(size):
            problem.constraints.append(exactly(line, size // 2))
            for start in range(size - 2):
                problem.constraints.append(
                    Condition(line[start : start + 3], lambda three: 0 < sum(three) < 3)
                )
        return problem


def _balanced(rng: Random, size: int) -> list[int]:
    task = BinaryPuzzle()
    givens = [-1] * size**2
    for cell in rng.sample(range(size**2), 3):
        givens[cell] = rng.randint(0, 1)
    problem = task.problem({"size": size, "givens": givens})
    problem.domains = [tuple(rng.sample(domain, len(domain))) for domain in problem.domains]
    found = next(Search(problem, max_nodes=200).solutions(), None)
    return found if found is not None else _balanced(rng, size)
