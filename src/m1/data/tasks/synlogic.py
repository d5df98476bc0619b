"""SynLogic's puzzles as tasks of ours, where the rules are the same.

A row has its puzzle as JSON in `extra_info.game_data_str`: question, answer, metadata. The metadata
of six games says all that our verifier must know. For the others it does not, or their rules are
not ours, which is named. Field names and rules are those of SynLogic's own generators and
verifiers; answers are in its own layouts, which `m1.rewards.synlogic` reads.
"""

import re
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
_EMPTY = ("X", "x", "_", "", "0")


class OtherRules(Exception):
    """Why a puzzle is none of ours; the first argument is a short name."""


def mapped(game: str, question: str, metadata: Row) -> tuple[str, Row]:
    """Name of our logic task, and the metadata that its verifier reads.

    Raises:
        OtherRules: It is another puzzle.
        KeyError, TypeError, ValueError: The metadata is not SynLogic's.
    """
    if game in _MAPPED:
        name, convert = _MAPPED[game]
        return name, convert(question, metadata)
    if game in _OTHER:
        raise OtherRules(f"{game}: {_OTHER[game]}")
    raise OtherRules("unknown_puzzle")


def _sudoku(_: str, data: Row) -> Row:
    rows = data["original_sudoku"]
    if len(rows) != 9:
        raise ValueError(f"a sudoku has {len(rows)} rows")
    return {"size": 9, "height": 3, "width": 3, "givens": _cells(rows, 9)}


def _numbrix(_: str, data: Row) -> Row:
    size = len(data["grid"])
    return {"size": size, "givens": _cells(data["grid"], size)}


def _skyscrapers(_: str, data: Row) -> Row:
    size = int(data["n"])
    rows = zip(data["left"], data["right"], strict=True)
    columns = zip(data["top"], data["bottom"], strict=True)
    clues = [[int(first), int(last)] for first, last in (*rows, *columns)]
    if len(clues) != 2 * size:
        raise ValueError(f"{len(clues)} pairs of clues for size {size}")
    return {"size": size, "givens": [0] * size**2, "clues": clues}


def _kakurasu(_: str, data: Row) -> Row:
    rows, columns = data["row_sums"], data["col_sums"]
    if len(rows) != len(columns):
        raise OtherRules("kukurasu: grid_not_square")
    return {"size": len(rows), "sums": [int(value) for value in (*rows, *columns)]}


def _futoshiki(question: str, data: Row) -> Row:
    """The given numbers stand in the question only."""
    size = int(data["grid_size"])
    row = rf"[ \t]*(?:[X\d]+[ \t]+){{{size - 1}}}[X\d]+[ \t]*"
    found = re.search(rf"^{row}(?:\n{row}){{{size - 1}}}$", question, re.MULTILINE)
    if found is None:
        raise ValueError("no grid in the question")
    givens = _cells([line.split() for line in found[0].splitlines()], size)
    places = {int(r) * size + int(c) for r, c in data["prefilled_coords"]}
    if {place for place, value in enumerate(givens) if value} != places:
        raise ValueError("the question's grid is not the metadata's")
    less = []
    for (r, c), (other_r, other_c), sign in data["constraints"]:
        pair = [int(r) * size + int(c), int(other_r) * size + int(other_c)]
        if sign not in ("<", ">"):
            raise ValueError(f"sign {sign!r}")
        less.append(pair if sign == "<" else pair[::-1])
    return {"size": size, "givens": givens, "less": less}


def _star_placement(_: str, data: Row) -> Row:
    if int(data["k"]) != 1:
        raise OtherRules("star_placement_puzzle: several_stars")
    grid, size = data["region_grid"], int(data["n"])
    letters = [str(cell) for row in grid for cell in row]
    if len(letters) != size**2:
        raise ValueError(f"{len(letters)} cells for size {size}")
    numbers = {letter: number for number, letter in enumerate(dict.fromkeys(letters))}
    return {"size": size, "regions": [numbers[letter] for letter in letters]}


def _cells(rows: list[list[Any]], size: int) -> list[int]:
    values = [0 if str(cell) in _EMPTY else int(cell) for row in rows for cell in row]
    if len(values) != size**2 or not all(0 <= value <= size**2 for value in values):
        raise ValueError(f"no grid of size {size}")
    return values


_MAPPED: dict[str, tuple[str, Callable[[str, Row], Row]]] = {
    "futoshiki": ("futoshiki", _futoshiki),
    "kukurasu": ("kakurasu", _kakurasu),
    "numbrix": ("numbrix", _numbrix),
    "skyscraper_puzzle": ("skyscrapers", _skyscrapers),
    "star_placement_puzzle": ("star_placement", _star_placement),
    "sudoku": ("sudoku", _sudoku),
}
_OTHER = {
    # The question and the verifier disagree on the rule, so that neither can be taken for ours.
    "campsite": "tents_beside_exactly_one_tree",
    "number_wall": "islands_may_not_touch_diagonally",
    # Rules of their own.
    "calcudoko": "cages_without_repetition",
    "minesweeper": "only_mines_that_are_certain",
    "norinori": "cells_that_must_be_shaded",
    "survo": "candidates_instead_of_1_to_n",
    # What the verifier must know is not in the metadata, or its answer has another form.
    **dict.fromkeys(
        (
            "arrow_maze", "boolean_expressions", "buggy_tables", "cipher", "cryptarithm",
            "dyck_language", "dyck_language_errors", "dyck_language_reasoning_errors",
            "game_of_24", "goods_exchange", "mathador", "math_path", "object_counting",
            "object_properties", "operation", "space_reasoning", "space_reasoning_tree",
            "time_sequence", "web_of_lies", "word_sorting", "word_sorting_mistake", "wordscapes",
            "zebra_puzzle", "arc_agi", "arc_agi_2",
        ),
        "other_question_or_answer",
    ),
}  # fmt: skip
