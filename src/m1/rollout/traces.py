"""Every rollout of an RL run on disk: one Parquet file a step, `step-000001.parquet`.

A file appears whole or not at all, and the same step gives the same bytes. `COLUMNS` documents the
schema; any Parquet reader can open it.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1.storage import disk_errors
from m1.types import Completion, M1Error, RolloutGroup

_NAME = re.compile(r"step-(\d{6,})\.parquet")
_ROWS_AT_ONCE = 256
COLUMNS: Mapping[str, str] = {
    "step": "RL step, from 1",
    "group": "number of the group among those sampled in the step, from 0",
    "index": "number of the rollout in its group, from 0",
    "task_id": "the task",
    "source": "where the task is from",
    "prompt": "the task's text, without the chat template",
    "text": "the completion, decoded, without the end token",
    "reference": "the task's reference answer",
    "prompt_tokens": "token ids given to the policy",
    "tokens": "token ids it sampled",
    "logprobs": "log-probability of each under the engine that sampled it, nats, float32",
    "policy_versions": "version of the weights that made each token",
    "finish_reason": "stop, length or repetition",
    "reward": "training reward",
    "accuracy": "unshaped correctness",
    "parts": "the reward's parts by name",
    "is_failed": "true after an infrastructure failure: the rewards mean nothing",
    "is_kept": "true where the group was trained on",
}


@dataclass(frozen=True)
class StoredRollout:
    """One row; fields as in `COLUMNS`."""

    step: int
    group: int
    index: int
    task_id: str
    source: str
    prompt: str
    text: str
    reference: str
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    policy_versions: tuple[int, ...]
    finish_reason: str
    reward: float
    accuracy: float
    parts: dict[str, float]
    is_failed: bool
    is_kept: bool


def write_step(
    folder: Path,
    step: int,
    groups: Sequence[RolloutGroup],
    *,
    decode: Callable[[Completion], str],
    kept: Sequence[RolloutGroup] = (),
) -> Path:
    """Write all groups that a step sampled, in place of an earlier attempt's file.

    Args:
        folder: Where the files of the run lie.
        step: RL step, from 1.
        groups: All that were sampled.
        decode: Text of a completion.
        kept: Those of them (the same objects) that were trained on.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"step-{step:06d}.parquet"
    partial = path.with_suffix(".partial")
    schema = _schema(pa)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            rows = _rows(step, groups, decode, {id(group) for group in kept})
            for batch in _batches(rows):
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
        partial.replace(path)
    return path


def steps_in(folder: Path) -> list[int]:
    """Steps that have a file."""
    if not folder.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def rewind(folder: Path, step: int) -> None:
    """Drop files after `step`: work that a resumed stage is about to repeat."""
    for later in steps_in(folder):
        if later > step:
            _path(folder, later).unlink()


def read_step(
    folder: Path, step: int, *, task: str | None = None, index: int | None = None
) -> list[StoredRollout]:
    """The rollouts of a step, in order.

    Args:
        folder: Where the files lie.
        step: RL step.
        task: Only those of this task.
        index: Only those with this number in their group.

    Raises:
        M1Error: The step has no file, or nothing in it is asked for; the message says what there
            is.
    """
    import pyarrow.parquet as pq

    if step not in steps_in(folder):
        raise M1Error(f"step {step} has no rollouts in {folder}; {_describe(steps_in(folder))}")
    filters = [("task_id", "=", task)] if task is not None else []
    filters += [("index", "=", index)] if index is not None else []  # type: ignore[list-item]
    table = pq.read_table(_path(folder, step), filters=filters or None)
    found = [_stored(row) for row in table.to_pylist()]
    if not found:
        known = pq.read_table(_path(folder, step), columns=["task_id", "index"]).to_pylist()
        tasks = list(dict.fromkeys(row["task_id"] for row in known))
        raise M1Error(
            f"step {step} has no rollout of task {task!r} with index {index}; its indices go to "
            f"{max(row['index'] for row in known)}, its tasks are {', '.join(tasks[:8])}"
            + (f" and {len(tasks) - 8} more" if len(tasks) > 8 else "")
        )
    return found


def tally_accuracy(folder: Path) -> dict[str, tuple[float, int]]:
    """Sum of accuracies and number of scored rollouts of every task over all steps."""
    import pyarrow.parquet as pq

    tallies: dict[str, tuple[float, int]] = {}
    for step in steps_in(folder):
        columns = ["task_id", "accuracy", "is_failed"]
        for row in pq.read_table(_path(folder, step), columns=columns).to_pylist():
            if not row["is_failed"]:
                total, count = tallies.get(row["task_id"], (0.0, 0))
                tallies[row["task_id"]] = (total + row["accuracy"], count + 1)
    return tallies


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.parquet"


def _describe(steps: Sequence[int]) -> str:
    if not steps:
        return "there are none of any step (rl.traces.every_steps may be 0)"
    shown = ", ".join(map(str, steps[:10]))
    return f"there are those of {len(steps)} steps: {shown}" + (", ..." if len(steps) > 10 else "")


def _schema(pa: Any) -> Any:
    kinds = {
        **dict.fromkeys(("step", "group", "index"), pa.int32()),
        **dict.fromkeys(("prompt_tokens", "tokens", "policy_versions"), pa.list_(pa.int32())),
        **dict.fromkeys(("reward", "accuracy"), pa.float64()),
        **dict.fromkeys(("is_failed", "is_kept"), pa.bool_()),
        "logprobs": pa.list_(pa.float32()),
        "parts": pa.map_(pa.string(), pa.float64()),
    }
    return pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])


def _rows(
    step: int,
    groups: Sequence[RolloutGroup],
    decode: Callable[[Completion], str],
    kept: Collection[int],
) -> Iterator[dict[str, Any]]:
    for number, group in enumerate(groups):
        for index, rollout in enumerate(group.rollouts):
            completion, reward = rollout.completion, rollout.reward
            yield {
                "step": step,
                "group": number,
                "index": index,
                "task_id": group.task.task_id,
                "source": group.task.source,
                "prompt": group.task.prompt,
                "text": decode(completion),
                "reference": group.task.reference,
                "prompt_tokens": completion.prompt_tokens,
                "tokens": completion.tokens,
                "logprobs": completion.logprobs,
                "policy_versions": completion.policy_versions,
                "finish_reason": completion.finish_reason,
                "reward": reward.total,
                "accuracy": reward.accuracy,
                "parts": list(reward.parts.items()),
                "is_failed": reward.is_failed,
                "is_kept": id(group) in kept,
            }


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rows in lists of bounded length, so that long completions need not be in memory at once."""
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _ROWS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _stored(row: dict[str, Any]) -> StoredRollout:
    lists = ("prompt_tokens", "tokens", "logprobs", "policy_versions")
    return StoredRollout(
        **{**row, "parts": dict(row["parts"]), **{name: tuple(row[name]) for name in lists}}
    )
