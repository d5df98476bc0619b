"""Puzzles of statements: boolean expressions, web of lies, zebra, syllogistic order, operations."""

from itertools import permutations
from random import Random
from typing import Any, ClassVar

from m1.data.logic.base import LogicTask, Puzzle, WrongAnswer, expect_integer, expect_text, words

_NAMES_TEXT = (
    "Ada Ben Cora Dan Eva Finn Gina Hugo Ida Jon Kira Leo Mia Ned Olga Paul Rosa Sam Tess Uwe "
)
_NAMES = _NAMES_TEXT.split()


class BooleanExpressions(LogicTask):
    """Which of several expressions are true."""

    name = "boolean_expressions"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Random trees of not, and, or, with comparisons as leaves."""
        count = 3 + difficulty // 2
        expressions = [_expression(rng, 1 + difficulty // 2) for _ in range(count)]
        right = [chr(ord("A") + i) for i, (_, value) in enumerate(expressions) if value]
        lines = "\n".join(f"{chr(ord('A') + i)}. {text}" for i, (text, _) in enumerate(expressions))
        question = (
            f"Which of these are true?\n\n{lines}\n\nAnswer with their letters, separated by "
            f"commas,"
            " or with none."
        )
        length = sum(len(text.split()) for text, _ in expressions)
        return Puzzle(question, ",".join(right) or "none", {"right": right, "length": length})

    def check(self, data: dict[str, Any], answer: str) -> None:
        """The set of letters."""
        given = [] if answer.strip().lower().rstrip(".") == "none" else words(answer)
        if sorted(given) != data["right"]:
            raise WrongAnswer("wrong")

    def cost(self, data: dict[str, Any]) -> float:
        """Words to read."""
        return float(data["length"])


class WebOfLies(LogicTask):
    """Who tells the truth, when each speaks of others."""

    name = "web_of_lies"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Statements about others, added until only one assignment is left."""
        people = rng.sample(_NAMES, 3 + difficulty // 2)
        truth = [rng.random() < 0.5 for _ in people]
        statements: list[list[int]] = [[0, -1, int(truth[0])]]
        while len(self._consistent(len(people), statements)) > 1:
            speaker, about = rng.sample(range(len(people)), 2)
            says = int(truth[about] == truth[speaker])
            if [speaker, about, says] not in statements:
                statements.append([speaker, about, says])
        data = {"people": people, "statements": statements}
        lines = [f"{people[0]} {'tells the truth' if truth[0] else 'lies'}."]
        lines += [
            f"{people[a]} says that {people[b]} {'tells the truth' if says else 'lies'}."
            for a, b, says in statements[1:]
        ]
        solution = ", ".join(name for name, value in zip(people, truth, strict=True) if value)
        question = (
            "Everyone here either always tells the truth or always lies.\n\n"
            + "\n".join(lines)
            + "\n\nWho tells the truth? Answer with the names, separated by commas, or with nobody."
        )
        return Puzzle(question, solution or "nobody", data)

    def check(self, data: dict[str, Any], answer: str) -> None:
        """The one consistent assignment."""
        people = data["people"]
        (values,) = self._consistent(len(people), data["statements"])
        right = sorted(name for name, value in zip(people, values, strict=True) if value)
        given = [] if answer.strip().lower().rstrip(".") == "nobody" else words(answer)
        if sorted(given) != right:
            raise WrongAnswer("wrong")

    def cost(self, data: dict[str, Any]) -> float:
        """Assignments times statements."""
        return float(2 ** len(data["people"]) * len(data["statements"]))

    def _consistent(self, count: int, statements: list[list[int]]) -> list[list[bool]]:
        found = []
        for number in range(2**count):
            values = [bool(number >> i & 1) for i in range(count)]
            if all(
                values[a] == bool(says) if b < 0 else values[a] == (values[b] == bool(says))
                for a, b, says in statements
            ):
                found.append(values)
        return found


class Zebra(LogicTask):
    """Houses in a row, attributes to assign, one question."""

    name = "zebra"
    _attributes: ClassVar = {
        "color": ["red", "blue", "green", "white", "black"],
        "pet": ["cat", "dog", "fish", "bird", "horse"],
        "drink": ["tea", "milk", "water", "juice", "coffee"],
        "job": ["baker", "nurse", "pilot", "judge", "cook"],
    }

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Clues are added until one assignment is left, then spared where they are not needed."""
        houses = 3 + (difficulty > 4)
        kinds = rng.sample(list(self._attributes), 2 + (difficulty > 2) + (difficulty > 7))
        order = {kind: rng.sample(self._attributes[kind][:houses], houses) for kind in kinds}
        clues = self._clues(rng, order, houses)
        kept: list[list[Any]] = []
        while len(self._solutions(kinds, houses, kept, 2)) > 1:
            kept.append(clues.pop())
        for clue in kept[:4]:
            rest = [other for other in kept if other is not clue]
            if len(self._solutions(kinds, houses, rest, 2)) == 1:
                kept = rest
        kind = rng.choice(kinds)
        asked = rng.choice(order[kind])
        other = rng.choice([k for k in kinds if k != kind])
        solution = order[other][order[kind].index(asked)]
        data = {"houses": houses, "kinds": kinds, "clues": kept, "asked": asked, "other": other}
        lists = "\n".join(f"{k}: {', '.join(self._attributes[k][:houses])}" for k in kinds)
        lines = "\n".join(f"- {_clue_text(clue)}" for clue in kept)
        question = (
            f"{houses} houses stand in a row, numbered from 1 on the left. Each has one of each of "
            f"these, no two the same.\n\n{lists}\n\n{lines}\n\nWhich {other} belongs to the house "
            f"with {asked}? Answer with one word."
        )
        return Puzzle(question, solution, data)

    def check(self, data: dict[str, Any], answer: str) -> None:
        """Solve it, and compare the word."""
        (solution,) = self._solutions(data["kinds"], data["houses"], data["clues"], 2)
        kind = next(k for k in data["kinds"] if data["asked"] in solution[k])
        expect_text(answer, solution[data["other"]][solution[kind].index(data["asked"])])

    def cost(self, data: dict[str, Any]) -> float:
        """Assignments to try, clue by clue."""
        size = len(list(permutations(range(data["houses"]))))
        return float(size ** len(data["kinds"]) * max(1, len(data["clues"])))

    def _clues(self, rng: Random, order: dict[str, list[str]], houses: int) -> list[list[Any]]:
        place = {value: i for values in order.values() for i, value in enumerate(values)}
        clues: list[list[Any]] = []
        for a in place:
            clues.append(["at", a, place[a] + 1])
            for b in place:
                if a < b and place[a] == place[b]:
                    clues.append(["same", a, b])
                if place[a] + 1 == place[b]:
                    clues.append(["left", a, b])
        weight = {"at": 0.0, "same": 1.0, "left": 1.0}
        return sorted(clues, key=lambda clue: weight[clue[0]] + rng.random() * 1.2)

    def _orders(self, kind: str, houses: int, clues: list[list[Any]]) -> list[tuple[str, ...]]:
        """Orders of one attribute that no clue about it alone forbids."""
        return [
            values
            for values in permutations(self._attributes[kind][:houses])
            if all(_clue_holds(clue, {v: i for i, v in enumerate(values)}) for clue in clues)
        ]

    def _solutions(
        self, kinds: list[str], houses: int, clues: list[list[Any]], limit: int
    ) -> list[dict[str, list[str]]]:
        found: list[dict[str, list[str]]] = []

        def extend(chosen: list[tuple[str, ...]], place: dict[str, int]) -> None:
            if len(chosen) == len(kinds):
                found.append(dict(zip(kinds, map(list, chosen), strict=True)))
                return
            for values, own in allowed[len(chosen)]:
                known = {**place, **own}
                if all(_clue_holds(clue, known) for clue in newest[len(chosen)]):
                    extend([*chosen, values], known)
                    if len(found) >= limit:
                        return

        orders = [self._orders(kind, houses, clues) for kind in kinds]
        allowed = [[(v, {x: i for i, x in enumerate(v)}) for v in order] for order in orders]
        known: set[str] = set()
        newest: list[list[list[Any]]] = []
        for order in orders:
            values = set(order[0]) if order else set()
            newest.append([c for c in clues if c[0] != "at" and {c[1], c[2]} & values])
            newest[-1] = [c for c in newest[-1] if {c[1], c[2]} & known]
            known |= values
        extend([], {})
        return found


class Operation(LogicTask):
    """Newly defined operators, nested."""

    name = "operation"
    _symbols = "@#&~"

    def draw(self, rng: Random, difficulty: int) -> Puzzle:
        """Linear definitions with a case distinction when it is hard."""
        count = 1 + difficulty // 3
        rules = [
            [rng.randint(1, 3), rng.randint(-2, 3), rng.randint(-4, 4), int(difficulty > 4)]
            for _ in range(count)
        ]
        expression = self._nested(rng, count, 1 + (difficulty + 1) // 2)
        data = {"rules": rules, "expression": expression}
        lines = []
        for symbol, (a, b, c, is_split) in zip(self._symbols, rules, strict=False):
            text = f"x {symbol} y = {a}*x + ({b})*y + ({c})"
            lines.append(text + (" if x > y, else x - y" if is_split else ""))
        question = (
            "Operators are defined:\n\n"
            + "\n".join(lines)
            + f"\n\nWhat is {self._text(expression)}? Answer with the number only."
        )
        return Puzzle(question, str(self._value(expression, rules)), data)

    def check(self, data: dict[str, Any], answer: str) -> None:
        """One number."""
        expect_integer(answer, self._value(data["expression"], data["rules"]))

    def cost(self, data: dict[str, Any]) -> float:
        """Applications of an operator."""
        return float(self._text(data["expression"]).count("(") + 1)

    def _nested(self, rng: Random, count: int, depth: int) -> Any:
        if depth == 0:
            return rng.randint(1, 9)
        left, right = self._nested(rng, count, depth - 1), rng.randint(1, 9)
        pair = [left, right] if rng.random() < 0.6 else [right, left]
        return [rng.randrange(count), *pair]

    def _text(self, expression: Any) -> str:
        if isinstance(expression, int):
            return str(expression)
        kind, left, right = expression
        sides = [
            self._text(s) if isinstance(s, int) else f"({self._text(s)})" for s in (left, right)
        ]
        return f"{sides[0]} {self._symbols[kind]} {sides[1]}"

    def _value(self, expression: Any, rules: list[list[int]]) -> int:
        if isinstance(expression, int):
            return expression
        kind, left, right = expression
        x, y = self._value(left, rules), self._value(right, rules)
        a, b, c, is_split = rules[kind]
        return a * x + b * y + c if not is_split or x > y else x - y


def _expression(rng: Random, depth: int) -> tuple[str, bool]:
    if depth == 0:
        a, b = rng.randint(1, 30), rng.randint(1, 30)
        sign = rng.choice([">", "<", "="])
        return f"{a} {sign} {b}", {">": a > b, "<": a < b, "=": a == b}[sign]
    kind = rng.choice(["not", "and", "or"])
    text, value = _expression(rng, depth - 1)
    if kind == "not":
        return f"not ({text})", not value
    other, second = _expression(rng, depth - 1)
    return f"({text}) {kind} ({other})", (value and second) if kind == "and" else (value or second)


def _clue_holds(clue: list[Any], place: dict[str, int]) -> bool:
    kind, a, b = clue
    if a not in place or (kind != "at" and b not in place):
        return True
    if kind == "at":
        return place[a] + 1 == int(b)
    return place[a] == place[b] if kind == "same" else place[a] + 1 == place[b]


def _clue_text(clue: list[Any]) -> str:
    kind, a, b = clue
    if kind == "at":
        return f"House {b} has {a}."
    return (
        f"The house with {a} has {b}."
        if kind == "same"
        else f"The house with {a} is directly left of the house with {b}."
    )
