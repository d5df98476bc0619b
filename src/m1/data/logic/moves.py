"""Puzzles solved by moves: tower of Hanoi, jugs."""

import re
from collections import deque
from collections.abc import Iterator
from random import Random
from typing import Any

from m1.data.logic.base import LogicTask, Puzzle, WrongAnswer, words


class TowerOfHanoi(LogicTask):
    """Move a legal position of discs to one peg; any legal sequence that is not too long."""

    name = "tower_of_hanoi"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Discs on random pegs."""
        num_discs = 2 + difficulty // 2
        pegs = [rng.randrange(3) for _ in range(num_discs)]
        pegs[-1] = 0  # the largest has to move, so the work doubles with each disc
        moves = _hanoi(pegs, num_discs - 1, 2)
        limit = 2 * 2**num_discs
        data = {"pegs": pegs, "limit": limit}
        places = "\n".join(
            f"peg {'ABC'[p]}: "
            + (" ".join(str(d + 1) for d in range(num_discs) if pegs[d] == p) or "empty")
            for p in range(3)
        )
        question = (
            f"Discs 1 (smallest) to {num_discs} lie on three pegs, listed from the top:\n\n{places}"
            "\n\nMove one disc at a time from the top of a peg onto an empty peg or a larger disc, "
            f"until all discs are on peg C, in at most {limit} moves. Answer with the moves, "
            f"each as "
            "two letters such as AC (from A to C), separated by spaces."
        )
        return Puzzle(question, " ".join("ABC"[a] + "ABC"[b] for a, b in moves), data)

    def check(self, data: dict[str, Any], answer: str) -> None:
        """Play the moves."""
        stacks: list[list[int]] = [[], [], []]
        for disc in range(len(data["pegs"]) - 1, -1, -1):
            stacks[data["pegs"][disc]].append(disc)
        moves = words(answer)
        if len(moves) > data["limit"]:
            raise WrongAnswer("too_many_moves")
        for move in moves:
            if not re.fullmatch("[ABC]{2}", move):
                raise WrongAnswer("malformed")
            source, target = (stacks["ABC".index(letter)] for letter in move)
            if not source or source is target or (target and target[-1] < source[-1]):
                raise WrongAnswer("illegal_move")
            target.append(source.pop())
        if len(stacks[2]) != len(data["pegs"]):
            raise WrongAnswer("not_finished")

    def cost(self, data: dict[str, Any]) -> float:
        """Moves of the direct solution."""
        return float(len(_hanoi(data["pegs"], len(data["pegs"]) - 1, 2)))


class Jugs(LogicTask):
    """Measure a volume with jugs: fill, empty, pour."""

    name = "jugs"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Sizes and a target that needs several moves."""
        least = 2 + difficulty // 2
        while True:
            sizes = sorted(rng.sample(range(2, 6 + difficulty), 2 + (difficulty > 5)))
            ways = _pouring(sizes)
            fitting = [t for t, moves in ways.items() if least <= len(moves) <= least + 1]
            if fitting:
                target = rng.choice(fitting)
                break
        data = {"sizes": sizes, "target": target}
        names = ", ".join(f"{'ABC'[i]} holds {s}" for i, s in enumerate(sizes))
        question = (
            f"Jugs are empty: {names} liters. Moves: 'fill A', 'empty A', 'pour A B' (until A is "
            f"empty or B full). Leave exactly {target} liters in one of the jugs. Answer with one "
            "move a line."
        )
        return Puzzle(question, "\n".join(ways[target]), data)

    def check(self, data: dict[str, Any], answer: str) -> None:
        """Play the moves, at most 200."""
        sizes = data["sizes"]
        levels = [0] * len(sizes)
        lines = [line.strip() for line in answer.splitlines() if line.strip()]
        if len(lines) > 200:
            raise WrongAnswer("too_many_moves")
        for line in lines:
            moved = _poured(line, tuple(levels), sizes)
            if moved is None:
                raise WrongAnswer("malformed")
            levels = list(moved)
        if data["target"] not in levels:
            raise WrongAnswer("not_measured")

    def cost(self, data: dict[str, Any]) -> float:
        """Moves of a shortest solution times the choices at each."""
        choices = 2 * len(data["sizes"]) + len(data["sizes"]) * (len(data["sizes"]) - 1)
        return float(choices ** len(_pouring(data["sizes"])[data["target"]]))


def _hanoi(pegs: list[int], disc: int, target: int) -> list[tuple[int, int]]:
    """Moves that bring discs 0 to `disc` from where they are to `target`."""
    pegs = list(pegs)
    moves: list[tuple[int, int]] = []

    def move(disc: int, target: int) -> None:
        if disc < 0:
            return
        if pegs[disc] != target:
            move(disc - 1, 3 - pegs[disc] - target)
            moves.append((pegs[disc], target))
            pegs[disc] = target
        move(disc - 1, target)

    move(disc, target)
    return moves


def _poured(move: str, levels: tuple[int, ...], sizes: list[int]) -> tuple[int, ...] | None:
    match = re.fullmatch(r"(fill|empty) ([A-C])|pour ([A-C]) (?:to )?([A-C])", move)
    if match is None:
        return None
    after = list(levels)
    names = "ABC"[: len(sizes)]
    if any(letter not in names for letter in (match[2], match[3], match[4]) if letter):
        return None
    if match[1]:
        jug = names.index(match[2])
        after[jug] = sizes[jug] if match[1] == "fill" else 0
        return tuple(after)
    source, target = names.index(match[3]), names.index(match[4])
    amount = min(levels[source], sizes[target] - levels[target]) if source != target else 0
    after[source] -= amount
    after[target] += amount
    return tuple(after)


def _pouring(sizes: list[int]) -> dict[int, list[str]]:
    """By volume, a shortest sequence of moves that leaves it in a jug; in order of length."""
    start = (0,) * len(sizes)
    came: dict[tuple[int, ...], tuple[tuple[int, ...], str]] = {start: (start, "")}
    first: dict[int, tuple[int, ...]] = {}
    queue = deque([start])
    while queue:
        levels = queue.popleft()
        for level in levels:
            first.setdefault(level, levels)
        for move, after in _moved(levels, sizes):
            if after not in came:
                came[after] = (levels, move)
                queue.append(after)
    return {level: _traced_moves(came, levels) for level, levels in first.items()}


def _moved(levels: tuple[int, ...], sizes: list[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for source, size in enumerate(sizes):
        name = "ABC"[source]
        yield f"fill {name}", (*levels[:source], size, *levels[source + 1 :])
        yield f"empty {name}", (*levels[:source], 0, *levels[source + 1 :])
        for target, room in enumerate(sizes):
            amount = min(levels[source], room - levels[target])
            if target != source and amount:
                after = list(levels)
                after[source] -= amount
                after[target] += amount
                yield f"pour {name} {'ABC'[target]}", tuple(after)


def _traced_moves(
    came: dict[tuple[int, ...], tuple[tuple[int, ...], str]], levels: tuple[int, ...]
) -> list[str]:
    moves = []
    while came[levels][1]:
        levels, move = came[levels]
        moves.append(move)
    return moves[::-1]
