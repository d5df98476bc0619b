"""Puzzles of marks kept apart: norinori, campsite, star placement."""

from collections.abc import Sequence
from random import Random
from typing import Any

from m1.data.logic.base import Puzzle, show
from m1.data.logic.cells import neighbours, rows_and_columns
from m1.data.logic.constraints import Condition, Problem
from m1.data.logic.shaded import SquareTask, at_most_one, exactly


class Norinori(SquareTask):
    """Two marked cells in each region; marked cells form separate dominoes."""

    name = "norinori"
    symbols = ".X"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Place dominoes apart, then grow regions over two marked cells each."""
        size = 4 + difficulty // 2
        values, seeds = _dominoes(rng, size)
        regions = _grown(rng, size, seeds)
        data = {"size": size, "regions": regions}
        letters = show([[_letter(regions[r * size + c]) for c in range(size)] for r in range(size)])
        question = (
            "The letters show the regions of a grid. Mark cells so that every region has exactly "
            "two marked cells and every marked cell has exactly one marked neighbour (up, "
            "down, left"
            f" or right), in its own region or another.\n\n{letters}\n\nAnswer with {size} "
            f"rows of X "
            "(marked) and . (not marked), separated by spaces."
        )
        return Puzzle(question, self.written(data, values), data)

    def problem(self, data: dict[str, Any]) -> Problem:
        """Two for each region, one neighbour for each marked cell."""
        size, regions = data["size"], data["regions"]
        problem = Problem([(0, 1)] * size**2)
        for region in sorted(set(regions)):
            cells = [i for i, other in enumerate(regions) if other == region]
            problem.constraints.append(exactly(cells, 2))
        for cell in range(size**2):
            near = neighbours(cell, size, size, diagonal=False)
            problem.constraints.append(
                Condition((cell, *near), lambda values: not values[0] or sum(values[1:]) == 1)
            )
        return problem


class Campsite(SquareTask):
    """A tent beside every tree; tents touch no other; rows and columns are counted."""

    name = "campsite"
    symbols = ".T"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Place tents apart, then a tree beside each."""
        size = 4 + difficulty // 2
        tents: list[int] = []
        trees: list[int] = []
        for cell in rng.sample(range(size**2), size**2):
            taken = {*tents, *trees}
            if cell in taken or len(tents) > size * size // 6:
                continue
            if any(near in tents for near in neighbours(cell, size, size, diagonal=True)):
                continue
            beside = [n for n in neighbours(cell, size, size, diagonal=False) if n not in taken]
            if beside:
                tents.append(cell)
                trees.append(rng.choice(beside))
        values = [int(i in tents) for i in range(size**2)]
        counts = [sum(values[i] for i in line) for line in rows_and_columns(size)]
        data = {"size": size, "trees": sorted(trees), "counts": counts}
        picture = show(
            [["#" if r * size + c in trees else "." for c in range(size)] for r in range(size)]
        )
        question = (
            "Trees are # on this map. Put as many tents as there are trees, so that trees and "
            "tents "
            "can be paired one to one with each tent directly beside (not diagonally) its "
            "tree, and "
            "no two tents touch, not even diagonally. Tents stand on free cells.\n\n"
            f"{picture}\n\nTents per row, top to bottom: {counts[:size]}\nTents per column, "
            f"left to "
            f"right: {counts[size:]}\nAnswer with {size} rows of T (tent) and . (no tent; "
            f"trees too "
            "are .), separated by spaces."
        )
        return Puzzle(question, self.written(data, values), data)

    def problem(self, data: dict[str, Any]) -> Problem:
        """Counts, distances, and a perfect pairing."""
        size, trees = data["size"], data["trees"]
        domains: list[tuple[int, ...]] = [(0,) if i in trees else (0, 1) for i in range(size**2)]
        problem = Problem(domains)
        for line, count in zip(rows_and_columns(size), data["counts"], strict=True):
            problem.constraints.append(exactly(line, count))
        for cell in range(size**2):
            for near in neighbours(cell, size, size, diagonal=True):
                if near > cell:
                    problem.constraints.append(at_most_one((cell, near)))
        everything = tuple(range(size**2))
        problem.constraints.append(Condition(everything, lambda v: _are_paired(v, trees, size)))
        return problem


class StarPlacement(SquareTask):
    """One star in each row, column and region; stars never touch."""

    name = "star_placement"
    symbols = ".*"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """A permutation whose neighbours are two apart; regions grow from its stars."""
        size = 4 + difficulty // 2
        columns: list[int] = []
        while len(columns) < size:
            columns = []
            for _ in range(size):
                open_ = [
                    c
                    for c in range(size)
                    if c not in columns and (not columns or abs(c - columns[-1]) > 1)
                ]
                if not open_:
                    break
                columns.append(rng.choice(open_))
        stars = [r * size + c for r, c in enumerate(columns)]
        regions = _grown(rng, size, [[star] for star in stars])
        data = {"size": size, "regions": regions}
        letters = show([[_letter(regions[r * size + c]) for c in range(size)] for r in range(size)])
        values = [int(i in stars) for i in range(size**2)]
        question = (
            "The letters show the regions of a grid. Place stars so that every row, every column "
            "and every region has exactly one star and no two stars touch, not even diagonally."
            f"\n\n{letters}\n\nAnswer with {size} rows of * (star) and . (no star), separated by "
            "spaces."
        )
        return Puzzle(question, self.written(data, values), data)

    def problem(self, data: dict[str, Any]) -> Problem:
        """Exactly one for each line and region, and distances."""
        size, regions = data["size"], data["regions"]
        problem = Problem([(0, 1)] * size**2)
        groups: list[Sequence[int]] = list(rows_and_columns(size))
        groups += [[i for i, r in enumerate(regions) if r == x] for x in range(size)]
        problem.constraints += [exactly(group, 1) for group in groups]
        for cell in range(size**2):
            for near in neighbours(cell, size, size, diagonal=True):
                if near > cell:
                    problem.constraints.append(at_most_one((cell, near)))
        return problem


def _dominoes(rng: Random, size: int) -> tuple[list[int], list[list[int]]]:
    """Marked cells in separate dominoes, and the pairs of marked cells that share a region."""
    marked: set[int] = set()
    dominoes: list[list[int]] = []
    for cell in rng.sample(range(size**2), size**2):
        near = neighbours(cell, size, size, diagonal=False)
        other = rng.choice(near)
        around = {cell, other, *near, *neighbours(other, size, size, diagonal=False)}
        if not around & marked:
            marked |= {cell, other}
            dominoes.append([cell, other])
    return [int(i in marked) for i in range(size**2)], dominoes


def _grown(rng: Random, size: int, seeds: list[list[int]]) -> list[int]:
    """Region of every cell, grown from the seeds until all cells belong to one."""
    regions = [-1] * size**2
    for number, cells in enumerate(seeds):
        for cell in cells:
            regions[cell] = number
    while -1 in regions:
        open_ = [i for i, region in enumerate(regions) if region < 0]
        cell = rng.choice(open_)
        near = [regions[n] for n in neighbours(cell, size, size, diagonal=False) if regions[n] >= 0]
        if near:
            regions[cell] = rng.choice(near)
    return regions


def _are_paired(values: Sequence[int], trees: Sequence[int], size: int) -> bool:
    """Whether tents and trees can be matched one to one with neighbours (augmenting paths)."""
    tents = [i for i, value in enumerate(values) if value]
    if len(tents) != len(trees):
        return False
    owner: dict[int, int] = {}

    def place(tent: int, seen: set[int]) -> bool:
        for tree in neighbours(tent, size, size, diagonal=False):
            if tree in trees and tree not in seen:
                seen.add(tree)
                if tree not in owner or place(owner[tree], seen):
                    owner[tree] = tent
                    return True
        return False

    return all(place(tent, set()) for tent in tents)


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else chr(ord("a") + number - 26)
