"""Tasks of a length stage (paper sec. 5): by pass rate in earlier lengths, and by source."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from m1.config.schema import LengthStageConfig
from m1.storage import atomic_write
from m1.types import M1Error, Task

PASS_RATES = "pass_rates.json"
"""File in an RL stage's output: `{task_id: [sum of accuracies, completions scored]}`."""
Tallies = dict[str, tuple[float, int]]


def select_tasks(
    tasks: Sequence[Task], length: LengthStageConfig, tallies: Mapping[str, tuple[float, int]]
) -> list[Task]:
    """Tasks to train on at this length, in order.

    A task stays if its pass rate in earlier lengths lies in [min_pass_rate, max_pass_rate] or is
    unknown, and if it falls into its source's `keep_fraction`, by a hash of its id: what a smaller
    share keeps, a larger one keeps too.

    Raises:
        M1Error: Nothing stays.
    """
    kept = [
        task
        for task in tasks
        if _is_in_range(tallies.get(task.task_id), length)
        and _place(task) < length.keep_fraction.get(task.source, 1.0)
    ]
    if tasks and not kept:
        raise M1Error(
            f"none of {len(tasks)} RL tasks is left at {length.max_new_tokens} tokens: pass rates "
            f"must lie in [{length.min_pass_rate}, {length.max_pass_rate}], shares to keep are "
            f"{length.keep_fraction}; widen them in rl.lengths"
        )
    return kept


def add_tallies(first: Mapping[str, tuple[float, int]], second: Tallies) -> Tallies:
    """Tallies of both, those of `second` in place of older ones of the same task."""
    return {**first, **second}


def write_tallies(folder: Path, tallies: Tallies) -> None:
    """Write `PASS_RATES` in a folder."""
    text = json.dumps({name: list(tally) for name, tally in sorted(tallies.items())})
    atomic_write(folder / PASS_RATES, text.encode())


def read_tallies(folder: Path) -> Tallies:
    """What `write_tallies` wrote; nothing where there is no such file."""
    path = folder / PASS_RATES
    if not path.exists():
        return {}
    return {name: (right, num) for name, (right, num) in json.loads(path.read_text()).items()}


def _is_in_range(tally: tuple[float, int] | None, length: LengthStageConfig) -> bool:
    if tally is None or tally[1] == 0:
        return True
    return length.min_pass_rate <= tally[0] / tally[1] <= length.max_pass_rate


def _place(task: Task) -> float:
    """A number in [0, 1) that belongs to the task."""
    digest = hashlib.sha256(f"keep/{task.task_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
