"""From two recipes to what their difference costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Literal

from m1.config.schema import Recipe
from m1.config.stages import in_order, parents_of, stage_hashes, stage_slice


class Absent(Enum):
    """Stands for a value that one of two recipes does not have."""

    ABSENT = "absent"


ABSENT: Final = Absent.ABSENT


@dataclass(frozen=True)
class FieldChange:
    """One field that differs; `old` and `new` are JSON values or ABSENT."""

    path: str
    old: Any
    new: Any


@dataclass(frozen=True)
class StageChange:
    """What happens to one stage between two recipes, and why."""

    stage: str
    status: Literal["unchanged", "changes", "added", "removed"]
    fields: tuple[FieldChange, ...] = ()
    """Fields of its own that differ."""
    parents: tuple[str, ...] = ()
    """Stages it reads that change, are added or are removed."""


def explain_diff(old: Recipe, new: Recipe) -> tuple[StageChange, ...]:
    """Say for each stage of either recipe, in order of execution, whether it changes and why."""
    old_hashes, new_hashes = stage_hashes(old), stage_hashes(new)
    changes = []
    for stage in in_order([*old_hashes, *new_hashes]):
        if stage not in old_hashes:
            changes.append(StageChange(stage, "added"))
        elif stage not in new_hashes:
            changes.append(StageChange(stage, "removed"))
        elif old_hashes[stage] == new_hashes[stage]:
            changes.append(StageChange(stage, "unchanged"))
        else:
            parents = {*parents_of(stage, old), *parents_of(stage, new)}
            changes.append(
                StageChange(
                    stage,
                    "changes",
                    fields=_differences(stage_slice(stage, old), stage_slice(stage, new)),
                    parents=tuple(
                        parent
                        for parent in in_order(parents)
                        if old_hashes.get(parent) != new_hashes.get(parent)
                    ),
                )
            )
    return tuple(changes)


def _differences(old: Any, new: Any, *, path: str = "") -> tuple[FieldChange, ...]:
    """Every leaf at which two JSON values differ, in the order of `old`, then of `new`."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = _numbered(old), _numbered(new)
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return () if old == new else (FieldChange(path, old, new),)
    return tuple(
        change
        for key in dict.fromkeys([*old, *new])
        for change in _differences(
            old.get(key, ABSENT), new.get(key, ABSENT), path=f"{path}.{key}" if path else key
        )
    )


def _numbered(values: Sequence[Any]) -> dict[str, Any]:
    return {str(index): value for index, value in enumerate(values)}
