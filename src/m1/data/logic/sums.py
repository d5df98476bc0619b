"""Puzzles of sums: survo, magic square, math path, cryptarithm."""

from collections import Counter
from math import perm
from random import Random
from typing import Any

from m1.data.logic.base import Puzzle, show
from m1.data.logic.cells import CellsTask, rows_and_columns
from m1.data.logic.constraints import AllDifferent, Problem, WeightedSum


class Survo(CellsTask):
    """Distinct numbers in a rectangle with given row and column sums."""

    name = "survo"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """A shuffled rectangle with holes."""
        rows, columns = 2 + difficulty // 4, 3 + difficulty // 5
        values = rng.sample(range(1, rows * columns + 1), rows * columns)
        num_holes = round(rows * columns * (0.4 + 0.05 * difficulty))
        holes = set(rng.sample(range(len(values)), min(num_holes, len(values) - 1)))
        givens = [0 if i in holes else v for i, v in enumerate(values)]
        table = [values[r * columns : (r + 1) * columns] for r in range(rows)]
        data = {
            "rows": rows,
            "columns": columns,
            "givens": givens,
            "row_sums": [sum(row) for row in table],
            "column_sums": [sum(column) for column in zip(*table, strict=True)],
        }
        picture = show(
            [[givens[r * columns + c] or "_" for c in range(columns)] for r in range(rows)]
        )
        question = (
            f"Fill the empty cells (_) so that the {rows}x{columns} table holds each number from 1 "
            f"to {rows * columns} once and has these sums.\n\n{picture}\n\nRow sums: "
            f"{data['row_sums']}\nColumn sums: {data['column_sums']}\nAnswer with the {rows} rows, "
            "numbers separated by spaces."
        )
        return Puzzle(question, self.written(data, values), data)

    def shape(self, data: dict[str, Any]) -> tuple[int, int]:
        """The rectangle."""
        return data["rows"], data["columns"]

    def problem(self, data: dict[str, Any]) -> Problem:
        """All different, and the sums."""
        rows, columns = self.shape(data)
        most = rows * columns
        free = tuple(v for v in range(1, most + 1) if v not in data["givens"])
        problem = Problem([(v,) if v else free for v in data["givens"]])
        problem.constraints.append(AllDifferent(tuple(range(most))))
        for row, total in enumerate(data["row_sums"]):
            scope = tuple(range(row * columns, (row + 1) * columns))
            problem.constraints.append(WeightedSum(scope, total, 1, most))
        for column, total in enumerate(data["column_sums"]):
            scope = tuple(range(column, most, columns))
            problem.constraints.append(WeightedSum(scope, total, 1, most))
        return problem


class MagicSquare(CellsTask):
    """Complete a square whose rows, columns and diagonals add to one number."""

    name = "magic_square"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """A turned and scaled 3x3 or 4x4 magic square with holes."""
        size = 3 if difficulty <= 5 else 4
        square = [[2, 7, 6], [9, 5, 1], [4, 3, 8]]
        if size == 4:
            square = [[1, 15, 14, 4], [12, 6, 7, 9], [8, 10, 11, 5], [13, 3, 2, 16]]
        for _ in range(rng.randrange(4)):
            square = [list(row) for row in zip(*square[::-1], strict=True)]
        if rng.random() < 0.5:
            square = [row[::-1] for row in square]
        scale, shift = rng.randint(1, 4), rng.randint(0, 20)
        values = [scale * v + shift for row in square for v in row]
        num_holes = round(size**2 * (0.4 + 0.05 * difficulty))
        holes = set(rng.sample(range(size**2), min(num_holes, size**2 - 2)))
        givens = [0 if i in holes else v for i, v in enumerate(values)]
        total = sum(values[:size])
        data = {"size": size, "givens": givens, "total": total, "numbers": sorted(values)}
        picture = show([[givens[r * size + c] or "_" for c in range(size)] for r in range(size)])
        question = (
            f"Fill the empty cells (_) so that every row, every column and both diagonals add to "
            f"{total}. Use each of these numbers exactly once in the whole square: "
            f"{sorted(values)}."
            f"\n\n{picture}\n\nAnswer with the {size} rows, numbers separated by spaces."
        )
        return Puzzle(question, self.written(data, values), data)

    def shape(self, data: dict[str, Any]) -> tuple[int, int]:
        """A square."""
        return data["size"], data["size"]

    def problem(self, data: dict[str, Any]) -> Problem:
        """All different, and the sums."""
        size, numbers = data["size"], data["numbers"]
        free = tuple(n for n in numbers if n not in data["givens"])
        problem = Problem([(v,) if v else free for v in data["givens"]])
        problem.constraints.append(AllDifferent(tuple(range(size**2))))
        lines = [*rows_and_columns(size), tuple(range(0, size**2, size + 1))]
        lines.append(tuple(range(size - 1, size**2 - 1, size - 1)))
        for line in lines:
            problem.constraints.append(WeightedSum(line, data["total"], numbers[0], numbers[-1]))
        return problem


class MathPath(CellsTask):
    """Digits for the blanks of a chain of sums so that every equation holds."""

    name = "math_path"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Equations a + b = c over shared blanks."""
        num_letters = 3 + difficulty // 2
        values = rng.sample(range(10), num_letters)
        equations: list[dict[str, Any]] = []
        order = rng.sample(range(num_letters), num_letters)
        for number in range(2 + difficulty // 4):
            # In turn, so that every letter stands in some equation.
            cells = [order[(3 * number + k) % num_letters] for k in range(3)]
            weights = [rng.randint(1, 2 + difficulty // 2) for _ in cells]
            total = sum(w * values[i] for w, i in zip(weights, cells, strict=True))
            equations.append({"cells": cells, "weights": weights, "total": total})
        data = {"count": num_letters, "equations": equations}
        lines = "\n".join(
            " + ".join(f"{w}*{_name(i)}" for w, i in zip(e["weights"], e["cells"], strict=True))
            + f" = {e['total']}"
            for e in equations
        )
        names = " ".join(_name(i) for i in range(num_letters))
        question = (
            f"Each of the letters {names} stands for a different digit from 0 to 9. All of these "
            f"hold:\n\n{lines}\n\nAnswer with the digits in the order {names}, on one line, "
            "separated by spaces."
        )
        return Puzzle(question, self.written(data, values), data)

    def shape(self, data: dict[str, Any]) -> tuple[int, int]:
        """One row."""
        return 1, data["count"]

    def problem(self, data: dict[str, Any]) -> Problem:
        """Different digits, and the equations."""
        digits = tuple(range(10))
        problem = Problem([digits] * data["count"], [AllDifferent(tuple(range(data["count"])))])
        for equation in data["equations"]:
            problem.constraints.append(
                WeightedSum(
                    tuple(equation["cells"]), equation["total"], 0, 9, tuple(equation["weights"])
                )
            )
        return problem

    def cost(self, data: dict[str, Any]) -> float:
        """Choices of different digits for the letters."""
        return float(perm(10, data["count"]))


class Cryptarithm(CellsTask):
    """Letters for digits in an addition."""

    name = "cryptarithm"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Encode a random sum by random letters."""
        num_digits = 2 + difficulty // 4
        while True:
            numbers = [
                rng.randint(10 ** (num_digits - 1), 10**num_digits - 1)
                for _ in range(2 + (difficulty > 6))
            ]
            digits = sorted(set("".join(map(str, [*numbers, sum(numbers)]))))
            letters = dict(zip(digits, rng.sample("ABCDEFGHKLMNPRST", len(digits)), strict=True))
            terms = ["".join(letters[d] for d in str(n)) for n in (*numbers, sum(numbers))]
            # A letter whose places cancel could stand for anything.
            is_bound = all(_weights(terms)[letter] for letter in letters.values())
            if len(digits) >= 3 + min(5, difficulty // 2) and is_bound:
                break
        order = sorted(letters.values())
        back = {letter: int(digit) for digit, letter in letters.items()}
        data = {"terms": terms, "letters": order}
        question = (
            "Each letter stands for a different digit, no number begins with 0, and the sum holds:"
            f"\n\n{' + '.join(terms[:-1])} = {terms[-1]}\n\nAnswer with the digits of the letters "
            f"{' '.join(order)} in this order, on one line, separated by spaces."
        )
        return Puzzle(question, self.written(data, [back[letter] for letter in order]), data)

    def shape(self, data: dict[str, Any]) -> tuple[int, int]:
        """One row."""
        return 1, len(data["letters"])

    def problem(self, data: dict[str, Any]) -> Problem:
        """Different digits, and the sum as one weighted sum of letters."""
        letters, terms = data["letters"], data["terms"]
        first = {term[0] for term in terms}
        weights = _weights(terms)
        domains = [tuple(range(1 if letter in first else 0, 10)) for letter in letters]
        scope = tuple(range(len(letters)))
        return Problem(
            domains,
            [
                AllDifferent(scope),
                WeightedSum(scope, 0, 0, 9, tuple(weights[letter] for letter in letters)),
            ],
        )


def _name(index: int) -> str:
    return chr(ord("A") + index)


def _weights(terms: list[str]) -> Counter[str]:
    """How much each letter adds to the left side minus the right one."""
    weights: Counter[str] = Counter()
    for number, term in enumerate(terms):
        sign = -1 if number == len(terms) - 1 else 1
        for place, letter in enumerate(reversed(term)):
            weights[letter] += sign * 10**place
    return weights
