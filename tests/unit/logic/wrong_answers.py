"""For every logic task, answers that are wrong by construction, near a right one.

Each maker takes a task and its right answer and changes it in a way that no valid solution allows:
one cell of a Latin square, one mark of a puzzle whose marks are counted, one move fewer of a
shortest way. Nothing here asks a verifier.
"""

import re
from collections.abc import Callable
from random import Random

from m1.types import Task

Maker = Callable[[Task, Random], str]


def other_cell(symbols: str | None = None) -> Maker:
    """One cell of the grid replaced by another value; `symbols` None means integers."""

    def make(task: Task, rng: Random) -> str:
        rows = [line.split() for line in task.reference.splitlines()]
        row = rng.randrange(len(rows))
        column = rng.randrange(len(rows[row]))
        values = sorted({cell for line in rows for cell in line} | set(symbols or ""))
        if symbols is None:
            values += [str(int(rows[row][column]) + 1), "0", "99"]
        rows[row][column] = rng.choice([v for v in values if v != rows[row][column]])
        return "\n".join(" ".join(line) for line in rows)

    return make


def other_number(task: Task, rng: Random) -> str:
    """Another integer near the right one."""
    return str(int(task.reference) + rng.choice([-1, 1]) * rng.randint(1, 30))


def other_word(task: Task, rng: Random) -> str:
    """The answer with one letter changed, twice, or with words beside it."""
    text = task.reference
    place = rng.randrange(len(text))
    changed = (
        text[:place] + rng.choice("qxzjk".replace(text[place].lower(), "")) + text[place + 1 :]
    )
    return rng.choice(
        [changed, text + " " + text, "not " + text, text[:-1], text + " or " + changed]
    )


def other_set(task: Task, rng: Random) -> str:
    """One item more, one fewer, or one replaced."""
    items = [] if task.reference in ("none", "nobody") else re.split(r"[,\s]+", task.reference)
    extra = rng.choice(["Z", "Q", "77", "Nemo"])
    if items and rng.random() < 0.5:
        items.pop(rng.randrange(len(items)))
        if items and rng.random() < 0.5:
            items.append(extra)
    else:
        items.append(extra)
    return ", ".join(items) or "all"


def fewer_steps(task: Task, rng: Random) -> str:
    """A shortest way without its last steps, or with a step that does not exist."""
    separator = "\n" if "\n" in task.reference or "fill" in task.reference else " "
    steps = task.reference.split(separator)
    if rng.random() < 0.5 and len(steps) > 1:
        return separator.join(steps[: rng.randrange(1, len(steps))])
    steps.insert(
        rng.randrange(len(steps) + 1), rng.choice(["X", "ZZ", "fill Q", "9,9", "AA", "0,0"])
    )
    return separator.join(steps)


def other_expression(task: Task, rng: Random) -> str:
    """A number changed, a number added, or a call instead of an expression."""
    text = task.reference
    numbers = list(re.finditer(r"\d+", text))
    place = rng.choice(numbers)
    changed = text[: place.start()] + str(int(place.group()) + 100) + text[place.end() :]
    return rng.choice(
        [changed, f"{text} + 1", f"{text} * 1 + 0", f"eval('{text}')", f"({text}", text + ";"]
    )


def other_order(task: Task, rng: Random) -> str:
    """Two different words exchanged, one dropped or one repeated."""
    separator = "\n" if "\n" in task.reference else " "
    items = task.reference.split(separator)
    kind = rng.randrange(3)
    if kind == 0:
        i, j = rng.sample(range(len(items)), 2)
        items[i], items[j] = items[j], items[i]
    elif kind == 1:
        items.pop(rng.randrange(len(items)))
    else:
        items.insert(rng.randrange(len(items)), rng.choice(items))
    return separator.join(items)


def other_brackets(task: Task, rng: Random) -> str:
    """One bracket replaced, dropped or added."""
    items = task.reference.split()
    place = rng.randrange(len(items))
    kind = rng.randrange(3)
    if kind == 0:
        items[place] = rng.choice([b for b in ")]}>" if b != items[place]])
    elif kind == 1:
        items.insert(place, rng.choice(")]}>"))
    else:
        items.pop(place)
    return " ".join(items) or "("


def other_time(task: Task, rng: Random) -> str:
    """Another half hour."""
    hour, minute = map(int, task.reference.split(":"))
    moved = (60 * hour + minute + 30 * rng.choice([-3, -2, -1, 1, 2, 3])) % 1440
    return f"{moved // 60:02d}:{moved % 60:02d}"


NUMBERS = other_cell()
MAKERS: dict[str, Maker] = {
    "sudoku": NUMBERS, "futoshiki": NUMBERS, "skyscrapers": NUMBERS, "calcudoku": NUMBERS,
    "kakurasu": other_cell(".X"), "norinori": other_cell(".X"), "campsite": other_cell(".T"),
    "minesweeper": other_cell(".*"), "star_placement": other_cell(".*"),
    "binary_puzzle": other_cell("01"), "survo": NUMBERS, "magic_square": NUMBERS,
    "numbrix": NUMBERS, "number_wall": other_cell(".#"), "arc_grids": NUMBERS,
    "math_path": other_cell("?"), "cryptarithm": other_cell("?"),
    "game_of_24": other_expression, "mathador": other_expression, "word_square": other_order,
    "arrow_maze": fewer_steps, "maze": fewer_steps, "tower_of_hanoi": fewer_steps,
    "jugs": fewer_steps, "dyck_language": other_brackets, "dyck_language_errors": other_number,
    "dyck_language_reasoning_errors": other_set, "boolean_expressions": other_set,
    "web_of_lies": other_set, "zebra": other_word, "operation": other_number,
    "object_counting": other_number, "object_properties": other_number,
    "goods_exchange": other_word, "buggy_tables": other_number, "space_reasoning": other_word,
    "space_reasoning_tree": other_number, "time_sequence": other_time,
    "calendar_walk": other_word, "cipher": other_word, "word_sorting": other_order,
    "word_sorting_mistake": other_number,
}  # fmt: skip
