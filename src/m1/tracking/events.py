"""Events of a pipeline run: one JSON object a line, appended by stages, read by the display."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

EventKind = Literal["start", "progress", "warning", "end", "cached", "error"]


@dataclass(frozen=True)
class EventLog:
    """Appends events to `path`; without a path it does nothing, so that a stage also runs alone."""

    path: Path | None

    def emit(self, stage: str, event: EventKind, **fields: Any) -> None:
        """Append one event.

        The line goes out in one O_APPEND write, so that lines of concurrent processes do not mix.

        Args:
            stage: Name of the stage.
            event: What happened.
            **fields: Any of step, total, phase, metrics, message, seconds; JSON values only.
        """
        if self.path is None:
            return
        line = json.dumps({"time": time.time(), "stage": stage, "event": event, **fields}) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def read_events(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Read the events that were completed since `offset`.

    A last line without its newline is left for the next call; a line that is no JSON object (a
    process died while writing it) is skipped. A file shorter than `offset` was started anew and is
    read from its beginning.

    Args:
        path: The events file; it need not exist yet.
        offset: Byte to start from: 0, or what the previous call returned.

    Returns:
        The events in order and the offset for the next call.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < offset:
                offset = 0
            file.seek(offset)
            complete, newline, _torn = file.read().rpartition(b"\n")
    except FileNotFoundError:
        return [], offset
    parsed = (_parse(line) for line in complete.splitlines())
    return [event for event in parsed if event], offset + len(complete) + len(newline)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and {"stage", "event"} <= event.keys() else None
