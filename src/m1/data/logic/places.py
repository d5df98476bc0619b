"""Puzzles of space and time: walks on rings and grids, family trees of places, schedules."""

from random import Random
from typing import Any

from m1.data.logic.base import LogicTask, Puzzle, WrongAnswer, expect_integer, expect_text

_THINGS_TEXT = "lamp book cup key clock plant vase phone ball shoe hat pen coin ring bowl box "
_THINGS = _THINGS_TEXT.split()
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


class SpaceReasoning(LogicTask):
    """What stands where a walk on a grid ends."""

    name = "space_reasoning"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Turns and steps in a square room whose walls stop the walker."""
        size = 3 + (difficulty > 3) if difficulty < 9 else 4
        things = rng.sample(_THINGS, size * size) if size * size <= len(_THINGS) else []
        row, column, heading = rng.randrange(size), rng.randrange(size), rng.randrange(4)
        names = ["north", "east", "south", "west"]
        lines = [f"You stand at the {things[row * size + column]} and look {names[heading]}."]
        for _ in range(2 + 2 * difficulty):
            kind = rng.randrange(3)
            if kind < 2:
                heading = (heading + (1 if kind else 3)) % 4
                lines.append(f"You turn {'right' if kind else 'left'}.")
            else:
                steps = rng.randint(1, 2)
                down, right = [(-1, 0), (0, 1), (1, 0), (0, -1)][heading]
                row = min(size - 1, max(0, row + down * steps))
                column = min(size - 1, max(0, column + right * steps))
                lines.append(f"You go {steps} step(s) ahead.")
        picture = "\n".join(" ".join(things[r * size : (r + 1) * size]) for r in range(size))
        end = things[row * size + column]
        question = (
            f"Things stand on a {size}x{size} floor, north at the top:\n\n{picture}\n\nA wall "
            f"around "
            "the floor stops you: you stay at the edge for the rest of a move that would leave "
            "it.\n" + " ".join(lines) + "\nAt which thing are you now? Answer with one word."
        )
        return Puzzle(question, end, {"end": end, "num_steps": len(lines)})

    def check(self, data: dict[str, Any], answer: str) -> None:
        """One word."""
        expect_text(answer, data["end"])

    def cost(self, data: dict[str, Any]) -> float:
        """Moves to follow."""
        return float(data["num_steps"])


class SpaceReasoningTree(LogicTask):
    """Distances in a tree of roads."""

    name = "space_reasoning_tree"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """A random tree with lengths; the distance of two places."""
        count = 5 + difficulty
        parents = [0] + [rng.randrange(i) for i in range(1, count)]
        lengths = [0] + [rng.randint(1, 9) for _ in range(1, count)]
        roads = [[i, parents[i], lengths[i]] for i in range(1, count)]
        rng.shuffle(roads)
        leaves = [i for i in range(count) if i not in parents[1:]]
        start, end = rng.sample(leaves if len(leaves) > 1 else range(count), 2)
        data = {"roads": roads, "start": start, "end": end}
        lines = "\n".join(
            f"{_place(a)} and {_place(b)} are joined by a road of {length} km."
            for a, b, length in roads
        )
        question = (
            f"{lines}\nThere are no other roads. How many km is the way from {_place(start)} to "
            f"{_place(end)}? Answer with the number only."
        )
        return Puzzle(question, str(_distance(data)), data)

    def check(self, data: dict[str, Any], answer: str) -> None:
        """One number."""
        expect_integer(answer, _distance(data))

    def cost(self, data: dict[str, Any]) -> float:
        """Roads to look at."""
        return float(len(data["roads"]))


class TimeSequence(LogicTask):
    """When several people are free together."""

    name = "time_sequence"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Busy times of some people; the first common free stretch."""
        people = ["Ada", "Ben", "Cora", "Dan", "Eva", "Finn"][: 2 + difficulty // 3]
        while True:
            busy = [
                sorted(
                    [start, start + 30 * rng.randint(1, 4)]
                    for start in rng.sample(range(480, 1080, 30), 2 + difficulty // 2)
                )
                for _ in people
            ]
            need = 30 * rng.randint(1, 2)
            start = _first_free(busy, need)
            if start is not None:
                break
        data = {"busy": busy, "need": need}
        lines = "\n".join(
            f"{name} is busy "
            + ", ".join(f"from {_clock(a)} to {_clock(min(b, 1080))}" for a, b in times)
            + "."
            for name, times in zip(people, busy, strict=True)
        )
        question = (
            f"The working day lasts from 08:00 to 18:00.\n{lines}\nWhat is the earliest time "
            f"at which"
            f" all can meet for {need} minutes? Answer as HH:MM."
        )
        return Puzzle(question, _clock(start), data)

    def check(self, data: dict[str, Any], answer: str) -> None:
        """One time."""
        start = _first_free(data["busy"], data["need"])
        assert start is not None
        if answer.strip().rstrip(".") not in (_clock(start), _clock(start).lstrip("0")):
            raise WrongAnswer("wrong")

    def cost(self, data: dict[str, Any]) -> float:
        """Intervals."""
        return float(sum(len(times) for times in data["busy"]))


class CalendarWalk(LogicTask):
    """A day of the week after a chain of shifts."""

    name = "calendar_walk"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Days and weeks forward and back."""
        day = start = rng.randrange(7)
        lines = []
        for _ in range(1 + difficulty):
            amount, sign = rng.randint(1, 10 * difficulty), rng.choice([1, -1])
            unit = rng.choice(["days", "weeks and a day"])
            day += sign * (amount if unit == "days" else 7 * amount + 1)
            lines.append(f"{amount} {unit} {'later' if sign > 0 else 'earlier'}")
        end = _DAYS[day % 7]
        question = (
            f"Start on a {_DAYS[start]}. Go "
            + ", then ".join(lines)
            + ". Which day of the week is it then? Answer with one word."
        )
        return Puzzle(question, end, {"end": end, "num_steps": len(lines)})

    def check(self, data: dict[str, Any], answer: str) -> None:
        """One word."""
        expect_text(answer, data["end"])

    def cost(self, data: dict[str, Any]) -> float:
        """Shifts to follow."""
        return float(data["num_steps"])


def _place(number: int) -> str:
    return f"Town{number}"


def _distance(data: dict[str, Any]) -> int:
    stack = [(data["start"], -1, 0)]
    while stack:
        here, came, total = stack.pop()
        if here == data["end"]:
            return total
        for a, b, length in data["roads"]:
            for there in ({a: b, b: a}.get(here),):
                if there is not None and there != came:
                    stack.append((there, here, total + length))
    raise ValueError("the roads do not join start and end")


def _first_free(busy: list[list[list[int]]], need: int) -> int | None:
    for start in range(480, 1080 - need + 1, 30):
        if all(b <= start or start + need <= a for times in busy for a, b in times):
            return start
    return None


def _clock(minutes: int) -> str:
    return f"{minutes // 60:02d}:{minutes % 60:02d}"
