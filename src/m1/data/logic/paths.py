"""Puzzles of ways: arrow maze, maze."""

import re
from collections import deque
from itertools import pairwise
from random import Random
from typing import Any, ClassVar

from m1.data.logic.base import LogicTask, Puzzle, WrongAnswer, show, words
from m1.data.logic.cells import neighbours


class ArrowMaze(LogicTask):
    """Follow arrows: from a cell one may go any distance in its direction, to the star."""

    name = "arrow_maze"
    _steps: ClassVar = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Random arrows until the star needs several jumps."""
        size = 3 + difficulty // 2
        least = 2 + difficulty // 2
        while True:
            cells = [rng.choice("UDLR") for _ in range(size**2)]
            goal = rng.randrange(1, size**2)
            cells[goal] = "*"
            route = self._route(cells, size)
            if route and len(route) > least:
                break
        data = {"size": size, "cells": "".join(cells)}
        picture = show([cells[r * size : (r + 1) * size] for r in range(size)])
        question = (
            "Start at row 1, column 1. Each cell shows a direction: U up, D down, L left, R right. "
            "From a cell jump any number of cells, at least one, in its direction, and stay inside "
            f"the grid. Reach the star (*).\n\n{picture}\n\nAnswer with the cells of the route "
            f"from "
            "start to star, each as row,column, separated by spaces, such as 1,1 1,3 2,3."
        )
        return Puzzle(question, " ".join(_cell(i, size) for i in route), data)

    def check(self, data: dict[str, Any], answer: str) -> None:
        """Each jump must follow its arrow."""
        size, cells = data["size"], data["cells"]
        route = _cells(answer, size)
        if route[0] != 0 or cells[route[-1]] != "*":
            raise WrongAnswer("wrong_ends")
        for here, there in pairwise(route):
            if there not in self._reachable(here, cells, size):
                raise WrongAnswer("wrong_jump")

    def cost(self, data: dict[str, Any]) -> float:
        """Cells a breadth-first search looks at."""
        size = data["size"]
        return float(
            sum(len(self._reachable(i, data["cells"], size)) for i in range(size**2)) * size
        )

    def _reachable(self, cell: int, cells: Any, size: int) -> list[int]:
        if cells[cell] not in self._steps:
            return []
        down, right = self._steps[cells[cell]]
        row, column = divmod(cell, size)
        found = []
        while 0 <= (row := row + down) < size and 0 <= (column := column + right) < size:
            found.append(row * size + column)
        return found

    def _route(self, cells: list[str], size: int) -> list[int]:
        came: dict[int, int] = {0: 0}
        queue = deque([0])
        while queue:
            here = queue.popleft()
            if cells[here] == "*":
                return _traced(came, here)
            for there in self._reachable(here, cells, size):
                if there not in came:
                    came[there] = here
                    queue.append(there)
        return []


class Maze(LogicTask):
    """Any shortest way through a maze with walls."""

    name = "maze"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Random walls that leave a way."""
        size = 4 + difficulty
        while True:
            walls = {i for i in range(1, size**2 - 1) if rng.random() < 0.3}
            route = _shortest(walls, size)
            if len(route) > size:
                break
        data = {"size": size, "walls": sorted(walls), "length": len(route) - 1}
        picture = show(
            [["#" if r * size + c in walls else "." for c in range(size)] for r in range(size)]
        )
        question = (
            "Go from the top left to the bottom right cell of this maze in as few steps as "
            "possible,"
            f" up, down, left or right, never into a wall (#).\n\n{picture}\n\nAnswer with the "
            f"steps"
            " as letters U, D, L, R, separated by spaces."
        )
        return Puzzle(question, " ".join(_moves(route, size)), data)

    def check(self, data: dict[str, Any], answer: str) -> None:
        """Walk the steps."""
        size, walls = data["size"], set(data["walls"])
        steps = words(answer)
        if len(steps) > 4 * size**2:
            raise WrongAnswer("malformed")
        row = column = 0
        for step in steps:
            if step not in ArrowMaze._steps:
                raise WrongAnswer("malformed")
            down, right = ArrowMaze._steps[step]
            row, column = row + down, column + right
            is_inside = 0 <= row < size and 0 <= column < size
            if not is_inside or row * size + column in walls:
                raise WrongAnswer("wrong_step")
        if (row, column) != (size - 1, size - 1):
            raise WrongAnswer("wrong_ends")
        if len(steps) != data["length"]:
            raise WrongAnswer("not_shortest")

    def cost(self, data: dict[str, Any]) -> float:
        """Open cells, all of which a breadth-first search may visit."""
        return float(data["size"] ** 2 - len(data["walls"]))


def _cell(index: int, size: int) -> str:
    return f"{index // size + 1},{index % size + 1}"


def _cells(answer: str, size: int) -> list[int]:
    found = []
    parts = answer.replace("(", "").replace(")", "").split()
    if not 2 <= len(parts) <= 4 * size**2:
        raise WrongAnswer("malformed")
    for part in parts:
        match = re.fullmatch(r"([0-9]{1,2}),([0-9]{1,2})", part)
        if match is None or not all(1 <= int(number) <= size for number in match.groups()):
            raise WrongAnswer("malformed")
        found.append((int(match[1]) - 1) * size + int(match[2]) - 1)
    return found


def _traced(came: dict[int, int], end: int) -> list[int]:
    route = [end]
    while came[route[-1]] != route[-1]:
        route.append(came[route[-1]])
    return route[::-1]


def _shortest(walls: set[int], size: int) -> list[int]:
    came, queue = {0: 0}, deque([0])
    while queue:
        here = queue.popleft()
        if here == size**2 - 1:
            return _traced(came, here)
        for there in neighbours(here, size, size, diagonal=False):
            if there not in walls and there not in came:
                came[there] = here
                queue.append(there)
    return []


def _moves(route: list[int], size: int) -> list[str]:
    names = {1: "R", -1: "L", size: "D", -size: "U"}
    return [names[there - here] for here, there in pairwise(route)]
