"""The common part of puzzles whose answer is a filled grid."""

from abc import abstractmethod
from typing import Any

from m1.data.logic.base import LogicTask, WrongAnswer, grid, show
from m1.data.logic.constraints import Problem, Search


class CellsTask(LogicTask):
    """A puzzle with a constraint problem over the cells of a grid, row by row."""

    symbols: str | None = None
    """What values 0, 1, ... are written as; None for integers written as such."""

    @abstractmethod
    def problem(self, data: dict[str, Any]) -> Problem:
        """The constraints of a puzzle."""

    @abstractmethod
    def shape(self, data: dict[str, Any]) -> tuple[int, int]:
        """Rows and columns of the answer."""

    def check(self, data: dict[str, Any], answer: str) -> None:
        """Every constraint must hold."""
        rows = grid(answer, *self.shape(data))
        values = [self._value(cell) for row in rows for cell in row]
        violated = self.problem(data).violated(values)
        if violated is not None:
            raise WrongAnswer(violated)

    def cost(self, data: dict[str, Any]) -> float:
        """Nodes of a backtracking search until it has shown whether there is a second solution."""
        search = Search(self.problem(data))
        for number, _ in enumerate(search.solutions()):
            if number:
                break
        return float(search.num_nodes)

    def other_solutions(self, data: dict[str, Any], limit: int) -> list[str]:
        """Up to `limit` solutions as answers, the stored one perhaps among them."""
        found: list[str] = []
        for values in Search(self.problem(data)).solutions():
            found.append(self.written(data, values))
            if len(found) == limit:
                break
        return found

    def written(self, data: dict[str, Any], values: list[int]) -> str:
        """An assignment as an answer."""
        _, columns = self.shape(data)
        cells = [self.symbol(value) for value in values]
        return show([cells[i : i + columns] for i in range(0, len(cells), columns)])

    def symbol(self, value: int) -> str:
        """A value as it is written."""
        return str(value) if self.symbols is None else self.symbols[value]

    def _value(self, cell: str) -> int:
        if self.symbols is not None:
            if len(cell) != 1 or cell not in self.symbols:
                raise WrongAnswer("malformed")
            return self.symbols.index(cell)
        if not (cell.isascii() and cell.lstrip("-").isdigit() and len(cell) < 6):
            raise WrongAnswer("malformed")
        return int(cell)


def rows_and_columns(size: int) -> list[tuple[int, ...]]:
    """Cell indices of every row, then every column, of a square grid."""
    rows = [tuple(range(r * size, (r + 1) * size)) for r in range(size)]
    columns = [tuple(range(c, size * size, size)) for c in range(size)]
    return rows + columns


def neighbours(cell: int, num_rows: int, num_columns: int, *, diagonal: bool) -> list[int]:
    """Cells beside a cell, diagonally too if asked."""
    row, column = divmod(cell, num_columns)
    steps = [(-1, 0), (1, 0), (0, -1), (0, 1)]
    steps += [(-1, -1), (-1, 1), (1, -1), (1, 1)] if diagonal else []
    near = [(row + r, column + c) for r, c in steps]
    return [r * num_columns + c for r, c in near if 0 <= r < num_rows and 0 <= c < num_columns]
