"""Tasks in files: JSONL, one object a line, or Parquet, metadata as JSON text."""

import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from m1.storage import atomic_write
from m1.types import M1Error, Task

_FIELDS = tuple(field.name for field in fields(Task))
_REQUIRED = ("task_id", "source", "prompt", "reference", "verifier")


def write_tasks(path: Path, tasks: Iterable[Task]) -> None:
    """Write tasks; `.parquet` as Parquet, everything else as JSONL."""
    if path.suffix == ".parquet":
        _write_parquet(path, tasks)
        return
    lines = [json.dumps(asdict(task), sort_keys=True, ensure_ascii=False) + "\n" for task in tasks]
    atomic_write(path, "".join(lines).encode())


def read_tasks(path: Path) -> list[Task]:
    """Tasks that `write_tasks` wrote.

    Raises:
        M1Error: A row is no task; the message has its number and what is wrong.
    """
    if path.suffix == ".parquet":
        return [_task(row, f"{path}, row {i}") for i, row in enumerate(_read_parquet(path))]
    with path.open(encoding="utf-8") as stream:
        return [_task(_object(line, f"{path}, line {i}"), f"{path}, line {i}")
                for i, line in enumerate(stream, start=1) if line.strip()]  # fmt: skip


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise M1Error(f"{place}: {error}; each line must be one JSON object") from error
    if not isinstance(row, dict):
        raise M1Error(f"{place} is {type(row).__name__}, but should be a JSON object")
    return row


def _task(row: dict[str, Any], place: str) -> Task:
    unknown = sorted(set(row) - set(_FIELDS))
    missing = [name for name in _REQUIRED if not isinstance(row.get(name), str)]
    if unknown or missing:
        raise M1Error(
            f"{place} is no task: missing or no text {missing}, unknown {unknown}; a task has "
            f"{', '.join(_FIELDS)}"
        )
    return Task(**row)


def _write_parquet(path: Path, tasks: Iterable[Task]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"metadata": pa.string(), "difficulty": pa.float64()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in _FIELDS])
    rows = [asdict(task) for task in tasks]
    for row in rows:
        row["metadata"] = json.dumps(row["metadata"], sort_keys=True, ensure_ascii=False)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    atomic_write(path, sink.getvalue().to_pybytes())


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    for row in rows:
        row["metadata"] = json.loads(row["metadata"])
    return rows
