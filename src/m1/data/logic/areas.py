"""Puzzles that fill or wall a grid: numbrix, number wall."""

from random import Random
from typing import Any

from m1.data.logic.base import LogicTask, Puzzle, WrongAnswer, grid, integer, show
from m1.data.logic.cells import neighbours


class Numbrix(LogicTask):
    """Number all cells so that successive numbers are side by side."""

    name = "numbrix"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """A winding path through all cells with numbers removed."""
        size = 3 + (difficulty + 1) // 3
        path = _full_path(rng, size)
        values = [0] * size**2
        for number, cell in enumerate(path, start=1):
            values[cell] = number
        holes = set(rng.sample(range(size**2), round(size**2 * (0.35 + 0.045 * difficulty))))
        givens = [0 if i in holes else v for i, v in enumerate(values)]
        data = {"size": size, "givens": givens}
        picture = show([[givens[r * size + c] or "_" for c in range(size)] for r in range(size)])
        question = (
            f"Fill the empty cells (_) so that the grid holds each number from 1 to {size**2} once "
            "and successive numbers are side by side, never diagonally.\n\n"
            f"{picture}\n\nAnswer with the {size} rows, numbers separated by spaces."
        )
        solution = show([values[r * size : (r + 1) * size] for r in range(size)])
        return Puzzle(question, solution, data)

    def check(self, data: dict[str, Any], answer: str) -> None:
        """All numbers, the given ones kept, neighbours side by side."""
        size, givens = data["size"], data["givens"]
        values = [integer(cell) for row in grid(answer, size, size) for cell in row]
        if sorted(values) != list(range(1, size**2 + 1)):
            raise WrongAnswer("wrong_numbers")
        if any(given and given != value for given, value in zip(givens, values, strict=True)):
            raise WrongAnswer("changed_givens")
        where = {value: cell for cell, value in enumerate(values)}
        for number in range(1, size**2):
            if where[number + 1] not in neighbours(where[number], size, size, diagonal=False):
                raise WrongAnswer("broken_path")

    def cost(self, data: dict[str, Any]) -> float:
        """Nodes of a depth-first search from 1 upwards."""
        return float(sum(1 for _ in _numbrix_nodes(data["givens"], data["size"], 50_000)))


class NumberWall(LogicTask):
    """Walls around islands of given sizes (nurikabe)."""

    name = "number_wall"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Place islands apart; retry until the wall is one piece without 2x2 blocks."""
        size = 3 + difficulty // 4
        while True:
            islands = _islands(rng, size)
            wall = [i for i in range(size**2) if not any(i in island for island in islands)]
            if islands and _wall_fault(set(wall), size) is None:
                break
        clues = [[rng.choice(island), len(island)] for island in islands]
        data = {"size": size, "clues": sorted(clues)}
        numbers = {cell: count for cell, count in clues}
        picture = show([[numbers.get(r * size + c, "_") for c in range(size)] for r in range(size)])
        solution = show(
            [["#" if r * size + c in wall else "." for c in range(size)] for r in range(size)]
        )
        question = (
            "Build walls on this grid. Every number belongs to an island of that many cells joined "
            "side by side; each island has exactly one number; islands touch only diagonally. All "
            "wall cells are joined side by side, and no 2x2 block is all wall.\n\n"
            f"{picture}\n\nAnswer with {size} rows of # (wall) and . (island), separated by spaces."
        )
        return Puzzle(question, solution, data)

    def check(self, data: dict[str, Any], answer: str) -> None:
        """Islands of the right sizes, one number each, and a sound wall."""
        size = data["size"]
        cells = [cell for row in grid(answer, size, size) for cell in row]
        if any(cell not in ("#", ".") for cell in cells):
            raise WrongAnswer("malformed")
        wall = {i for i, cell in enumerate(cells) if cell == "#"}
        fault = _wall_fault(wall, size)
        if fault is not None:
            raise WrongAnswer(fault)
        clues = {cell: count for cell, count in data["clues"]}
        open_ = set(range(size**2)) - wall
        while open_:
            island = _joined(open_, next(iter(open_)), size)
            numbers = [clues[i] for i in island if i in clues]
            if numbers != [len(island)]:
                raise WrongAnswer("wrong_island")
            open_ -= island
        if any(cell in wall for cell in clues):
            raise WrongAnswer("wrong_island")

    def cost(self, data: dict[str, Any]) -> float:
        """Markings of the cells without a number."""
        return float(2 ** (data["size"] ** 2 - len(data["clues"])))


def _full_path(rng: Random, size: int) -> list[int]:
    """A path through all cells: a snake, bent by random reversals of its ends."""
    rows = [list(range(r * size, (r + 1) * size)) for r in range(size)]
    path = [cell for r, row in enumerate(rows) for cell in (row if r % 2 == 0 else row[::-1])]
    for _ in range(20 * size**2):
        if rng.random() < 0.5:
            path.reverse()
        # The first cell has a neighbour further on: what lies before it can be turned round.
        near = [n for n in neighbours(path[0], size, size, diagonal=False) if n != path[1]]
        place = path.index(rng.choice(near)) if near else 1
        path[:place] = path[:place][::-1]
    return path


def _numbrix_nodes(givens: list[int], size: int, limit: int) -> Any:
    where = {value: cell for cell, value in enumerate(givens) if value}
    stack = [(1, cell, 1 << cell) for cell in ([where[1]] if 1 in where else range(size**2))]
    stack = [entry for entry in stack if givens[entry[1]] in (0, 1)]
    count = 0
    while stack and count < limit:
        number, cell, used = stack.pop()
        count += 1
        yield cell
        if number == size**2:
            return
        for near in neighbours(cell, size, size, diagonal=False):
            fits = givens[near] in (0, number + 1) and where.get(number + 1, near) == near
            if fits and not used >> near & 1:
                stack.append((number + 1, near, used | 1 << near))


def _islands(rng: Random, size: int) -> list[list[int]]:
    taken: set[int] = set()
    islands: list[list[int]] = []
    for start in rng.sample(range(size**2), size**2):
        if start in taken:
            continue
        island = [start]
        for _ in range(rng.randrange(4)):
            near = {n for c in island for n in neighbours(c, size, size, diagonal=False)}
            if choices := sorted(near - taken - set(island)):
                island.append(rng.choice(choices))
        if len(islands) <= size * size // 5 and not set(island) & taken:
            islands.append(island)
            taken |= set(island)
            taken |= {n for c in island for n in neighbours(c, size, size, diagonal=False)}
    return islands


def _joined(cells: set[int], start: int, size: int) -> set[int]:
    found, queue = {start}, [start]
    while queue:
        for near in neighbours(queue.pop(), size, size, diagonal=False):
            if near in cells and near not in found:
                found.add(near)
                queue.append(near)
    return found


def _wall_fault(wall: set[int], size: int) -> str | None:
    if not wall or _joined(wall, next(iter(wall)), size) != wall:
        return "broken_wall"
    for row in range(size - 1):
        for column in range(size - 1):
            corner = row * size + column
            if {corner, corner + 1, corner + size, corner + size + 1} <= wall:
                return "wall_block"
    return None
