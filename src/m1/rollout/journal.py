"""Finished groups on disk, one file each from the moment they are scored until they are trained on.

A ticket is the number of a task in the order in which tasks were taken.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from m1.storage import atomic_write, disk_errors
from m1.types import Completion, Reward, Rollout, RolloutGroup, RoutedExperts, Task

_SUFFIX = ".group.json"
_STEPS = "steps.jsonl"


class Journal:
    """Groups by ticket."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, ticket: int, group: RolloutGroup) -> None:
        """Keep a finished group."""
        atomic_write(self._path(ticket), json.dumps(to_json(group)).encode())

    def read(self, ticket: int, task: Task) -> RolloutGroup | None:
        """The group of a ticket, if there is one and it is of this task."""
        try:
            group = from_json(json.loads(self._path(ticket).read_bytes()))
        except FileNotFoundError:
            return None
        return group if group.task == task else None

    def note(self, step: int, **tickets: Sequence[int]) -> None:
        """Record what became of tickets in a step, such as `kept=[3, 5]`."""
        line = json.dumps({"step": step, **{name: list(t) for name, t in tickets.items()}})
        with disk_errors(self._folder), (self._folder / _STEPS).open("a") as file:
            file.write(line + "\n")

    def steps(self) -> list[dict[str, Any]]:
        """What was noted; a torn last line is left out."""
        path = self._folder / _STEPS
        if not path.exists():
            return []
        whole, _, _ = path.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def rewind(self, step: int) -> None:
        """Drop what was noted from `step` on: it is about to be repeated."""
        kept = [line for line in self.steps() if line["step"] < step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        atomic_write(self._folder / _STEPS, text.encode())

    def tickets(self) -> list[int]:
        """Of all groups."""
        found = self._folder.glob(f"*{_SUFFIX}")
        return sorted(int(path.name.removesuffix(_SUFFIX)) for path in found)

    def newest_version(self) -> int:
        """Largest policy version of any token; -1 without groups."""
        newest = -1
        for ticket in self.tickets():
            group = from_json(json.loads(self._path(ticket).read_bytes()))
            for rollout in group.rollouts:
                newest = max(newest, *rollout.completion.policy_versions, -1)
        return newest

    def drop(self, tickets: Iterable[int]) -> None:
        """Forget groups."""
        for ticket in tickets:
            self._path(ticket).unlink(missing_ok=True)

    def _path(self, ticket: int) -> Path:
        return self._folder / f"{ticket:09d}{_SUFFIX}"


def to_json(group: RolloutGroup) -> dict[str, Any]:
    """A group as JSON types; floats survive to the last bit."""
    return {
        "task": asdict(group.task),
        "rollouts": [
            {"completion": asdict(r.completion), "reward": asdict(r.reward)} for r in group.rollouts
        ],
    }


def from_json(value: Mapping[str, Any]) -> RolloutGroup:
    """What `to_json` made."""
    task = Task(**value["task"])
    return RolloutGroup(
        task=task,
        rollouts=tuple(
            Rollout(task, _completion(r["completion"]), Reward(**r["reward"]))
            for r in value["rollouts"]
        ),
    )


def _completion(value: Mapping[str, Any]) -> Completion:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
    if fields.get("routed_experts") is not None:
        fields["routed_experts"] = RoutedExperts(**fields["routed_experts"])
    return Completion(**fields)
