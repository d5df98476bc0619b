"""All logic tasks by name."""

from m1.data.logic import (
    areas,
    brackets,
    expressions,
    latin,
    letters,
    moves,
    objects,
    paths,
    places,
    regions,
    shaded,
    statements,
    sums,
    word_square,
)  # fmt: skip
from m1.data.logic.base import LogicTask
from m1.types import M1Error

_KINDS: tuple[type[LogicTask], ...] = (
    latin.Sudoku, latin.Futoshiki, latin.Skyscrapers, latin.Calcudoku,
    shaded.Kakurasu, regions.Norinori, regions.Campsite, shaded.Minesweeper, regions.StarPlacement,
    shaded.BinaryPuzzle,
    sums.Survo, sums.MagicSquare, sums.MathPath, sums.Cryptarithm,
    expressions.GameOf24, expressions.Mathador,
    word_square.WordSquare,
    areas.Numbrix, areas.NumberWall, paths.ArrowMaze, paths.Maze, moves.TowerOfHanoi, moves.Jugs,
    brackets.DyckLanguage, brackets.DyckLanguageErrors, brackets.DyckLanguageReasoningErrors,
    statements.BooleanExpressions, statements.WebOfLies, statements.Zebra, statements.Operation,
    objects.ObjectCounting, objects.ObjectProperties, objects.GoodsExchange, objects.BuggyTables,
    places.SpaceReasoning, places.SpaceReasoningTree, places.TimeSequence, places.CalendarWalk,
    letters.Cipher, letters.WordSorting, letters.WordSortingMistake, letters.ArcGrids,
)  # fmt: skip

LOGIC_TASKS: dict[str, LogicTask] = {kind.name: kind() for kind in _KINDS}


def logic_task(name: str) -> LogicTask:
    """The task of a name.

    Raises:
        M1Error: There is none.
    """
    if name not in LOGIC_TASKS:
        known = ", ".join(sorted(LOGIC_TASKS))
        raise M1Error(f"logic task {name!r} is not known; known: {known}")
    return LOGIC_TASKS[name]
