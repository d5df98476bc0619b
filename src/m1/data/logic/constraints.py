"""A small finite-domain solver: what a grid puzzle demands, once, for judging and for searching.

A puzzle states its constraints; an answer is right when all hold. The same constraints let a plain
backtracking search find other solutions and count its steps, which is the puzzle's cost.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Constraint(Protocol):
    """A condition on some variables."""

    @property
    def scope(self) -> tuple[int, ...]:
        """Indices of its variables."""

    def allows(self, values: Sequence[int | None]) -> bool:
        """Whether the values, None where unknown, can still satisfy it; exact once all known."""


@dataclass(frozen=True)
class AllDifferent:
    """No value twice."""

    scope: tuple[int, ...]

    def allows(self, values: Sequence[int | None]) -> bool:
        """Compare what is known."""
        known = [value for value in values if value is not None]
        return len(known) == len(set(known))


@dataclass(frozen=True)
class WeightedSum:
    """sum(weight * value) == total, for values not below `least` nor above `most`."""

    scope: tuple[int, ...]
    total: int
    least: int
    most: int
    weights: tuple[int, ...] = ()

    def allows(self, values: Sequence[int | None]) -> bool:
        """Bound what the unknown can add."""
        low = high = 0
        for weight, value in zip(self.weights or (1,) * len(values), values, strict=True):
            ends = (self.least, self.most) if value is None else (value, value)
            low += min(weight * ends[0], weight * ends[1])
            high += max(weight * ends[0], weight * ends[1])
        return low <= self.total <= high


@dataclass(frozen=True)
class Condition:
    """Any predicate of all values; checked once they are known."""

    scope: tuple[int, ...]
    holds: Callable[[Sequence[int]], bool]

    def allows(self, values: Sequence[int | None]) -> bool:
        """True until all are known."""
        known = [value for value in values if value is not None]
        return len(known) < len(values) or self.holds(known)


@dataclass
class Problem:
    """Variables by index, their domains, and constraints."""

    domains: list[tuple[int, ...]]
    constraints: list[Constraint] = field(default_factory=list)

    def violated(self, values: Sequence[int]) -> str | None:
        """Name of what an assignment violates; None when it is a solution."""
        if len(values) != len(self.domains):
            return "malformed"
        if any(value not in domain for value, domain in zip(values, self.domains, strict=True)):
            return "outside_domain"
        for constraint in self.constraints:
            if not constraint.allows([values[i] for i in constraint.scope]):
                return f"violates_{type(constraint).__name__.lower()}"
        return None


@dataclass
class Search:
    """Backtracking with the smallest domain first and forward checking by single values."""

    problem: Problem
    max_nodes: int = 4_000
    num_nodes: int = 0
    """Assignments tried so far."""

    def solutions(self) -> Iterator[list[int]]:
        """Solutions until none is left or the nodes are used up."""
        values: list[int | None] = [None] * len(self.problem.domains)
        touching: list[list[Constraint]] = [[] for _ in values]
        for constraint in self.problem.constraints:
            for index in constraint.scope:
                touching[index].append(constraint)
        yield from self._extend(values, touching)

    def _extend(
        self, values: list[int | None], touching: list[list[Constraint]]
    ) -> Iterator[list[int]]:
        best: tuple[int, int, list[int]] | None = None
        for index, value in enumerate(values):
            if value is None:
                open_values = self._open(index, values, touching)
                if best is None or len(open_values) < best[0]:
                    best = (len(open_values), index, open_values)
                if best[0] <= 1:
                    break
        if best is None:
            yield [value for value in values if value is not None]
            return
        _, index, open_values = best
        for value in open_values:
            if self.num_nodes >= self.max_nodes:
                return
            self.num_nodes += 1
            values[index] = value
            yield from self._extend(values, touching)
        values[index] = None

    def _open(
        self, index: int, values: list[int | None], touching: list[list[Constraint]]
    ) -> list[int]:
        found = []
        for value in self.problem.domains[index]:
            values[index] = value
            if all(c.allows([values[i] for i in c.scope]) for c in touching[index]):
                found.append(value)
        values[index] = None
        return found
