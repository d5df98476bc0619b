"""Worked solutions in short steps, which teach a small model to compute by writing.

`4 - 1 - 7` becomes `4-1=3 3-7=-4`. Solving a task anew also confirms its reference: reasoning-gym's
`basic_arithmetic` without parentheses answers some of its own questions left to right, against the
precedence of `*` and `/`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from m1.types import M1Error, Task

_SYMBOL = re.compile(r"\d+|[-+*/()]")


@dataclass(frozen=True)
class Solution:
    """Steps as text, and the answer they lead to."""

    steps: tuple[str, ...]
    answer: str


class _Arithmetic:
    """Recursive descent over integers, `+ - * /`, parentheses and signs; every operation is a step.

    Division must be exact: ArithmeticError otherwise.
    """

    def __init__(self, expression: str) -> None:
        self._symbols = [*_SYMBOL.findall(expression), ""]
        self.steps: list[str] = []

    def sum(self) -> int:
        value = self._product()
        while self._symbols[0] in ("+", "-"):
            value = self._step(value, self._symbols.pop(0), self._product())
        return value

    def _product(self) -> int:
        value = self._factor()
        while self._symbols[0] in ("*", "/"):
            value = self._step(value, self._symbols.pop(0), self._factor())
        return value

    def _factor(self) -> int:
        symbol = self._symbols.pop(0)
        if symbol == "-":
            is_number = self._symbols[0].isdigit()
            value = self._factor()
            if not is_number:
                self.steps.append(f"-({value})={-value}")
            return -value
        if symbol == "(":
            value = self.sum()
            self._symbols.pop(0)
            return value
        return int(symbol)

    def _step(self, left: int, operator: str, right: int) -> int:
        if operator == "/" and (right == 0 or left % right):
            raise ArithmeticError(f"{left}/{right} is not an integer")
        results = {"+": left + right, "-": left - right, "*": left * right}
        value = left // right if operator == "/" else results[operator]
        self.steps.append(f"{left}{operator}{right}={value}")
        return value


def _solve_arithmetic(task: Task) -> Solution | None:
    arithmetic = _Arithmetic(task.metadata["expression"])
    try:
        answer = arithmetic.sum()
    except ArithmeticError:
        return None
    return Solution(tuple(arithmetic.steps), str(answer))


# Solvers by reasoning-gym dataset; None from a solver means that it cannot confirm the task.
SOLVERS: dict[str, Callable[[Task], Solution | None]] = {
    "basic_arithmetic": _solve_arithmetic,
    "chain_sum": _solve_arithmetic,
}


def require_solver(name: str, dataset: str) -> None:
    """Raise unless worked solutions exist for `dataset`, used by the task entry `name`."""
    if dataset not in SOLVERS:
        raise M1Error(
            f"data.tasks {name!r} asks for num_sft demonstrations, but dataset {dataset!r} has no "
            f"solution writer; set num_sft to 0 or use one of: {', '.join(sorted(SOLVERS))}"
        )


def write_solution(task: Task) -> str:
    """The `think` text of a task: its steps, or the answer itself when there is nothing to do."""
    dataset = task.verifier.removeprefix("reasoning_gym:")
    require_solver(task.source, dataset)
    solution = SOLVERS[dataset](task)
    if solution is None or solution.answer != task.reference:
        raise ValueError(f"the worked answer of {task.task_id} is not {task.reference}: {solution}")
    return " ".join(solution.steps) or solution.answer
