import io
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from m1.tracking.display import PipelineDisplay, print_summary
from m1.tracking.events import EventLog
from m1.tracking.progress import StageProgress, format_duration

SUMMARY = {
    "recipe": "laptop",
    "recipe_hash": "ab" * 32,
    "git_commit": "cd" * 20,
    "wall_seconds": 130.0,
    "stages": {
        "data": {"hash": "11" * 32, "status": "cached", "seconds": 2.0, "outputs": {}},
        "pretrain": {"hash": "22" * 32, "status": "done", "seconds": 120.5, "outputs": {}},
    },
    "scores": {
        "chain_sum": {
            "pretrain": {"mean": 0.1, "low": 0.05, "high": 0.15, "n": 40},
            "rl": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 40},
        }
    },
}


def _console(*, terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=140, color_system=None)


def test_log_output_has_one_line_per_start_and_end(tmp_path):
    console, path = _console(terminal=False), tmp_path / "events.jsonl"
    log = EventLog(path)
    with PipelineDisplay(["data", "pretrain", "sft"], path, console):
        log.emit("data", "cached", message="11aa")
        log.emit("pretrain", "start")
        for step in range(50):
            log.emit("pretrain", "progress", step=step, total=50, metrics={"pretrain/loss": 5.0})
        log.emit("pretrain", "end")
        log.emit("sft", "error", message="out of memory")
    lines = console.file.getvalue().splitlines()
    assert lines[:2] == ["data: cached", "pretrain: running"]
    assert lines[-2].startswith("pretrain: done in ")
    assert lines[-1] == "sft: failed out of memory"
    assert len(lines) == 4


def test_log_output_keeps_square_brackets_of_messages(tmp_path):
    console, path = _console(terminal=False), tmp_path / "events.jsonl"
    with PipelineDisplay(["data"], path, console):
        EventLog(path).emit("data", "error", message="[/red] tensor[0]")
    assert "[/red] tensor[0]" in console.file.getvalue()


def test_terminal_ends_with_one_row_per_stage(tmp_path):
    console, path = _console(terminal=True), tmp_path / "events.jsonl"
    log = EventLog(path)
    with PipelineDisplay(["data", "rl", "evaluate"], path, console):
        log.emit("data", "start")
        log.emit("data", "end")
        log.emit("rl", "start")
        metrics = {"rl/loss": 0.01, "rl/reward": 0.75, "rl/tokens_per_second": 1234.0}
        log.emit("rl", "progress", step=3, total=10, metrics=metrics)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    last = text[text.rindex("stage ") :]
    assert re.search(r"data\s+done", last)
    assert re.search(r"rl\s+running.*3/10\s+reward 0\.750\s+1,234", last)
    assert re.search(r"evaluate\s+waiting", last)


def test_events_of_an_earlier_attempt_are_not_shown(tmp_path):
    console, path = _console(terminal=False), tmp_path / "events.jsonl"
    EventLog(path).emit("data", "error", message="old")
    with PipelineDisplay(["data"], path, console):
        EventLog(path).emit("data", "start")
    assert console.file.getvalue().splitlines() == ["data: running"]


def test_display_passes_on_the_exception_of_its_block(tmp_path):
    with (
        pytest.raises(KeyError),
        PipelineDisplay(["data"], tmp_path / "absent.jsonl", _console(terminal=True)),
    ):
        raise KeyError


def test_time_left_counts_only_steps_of_this_attempt():
    stage, now = StageProgress("pretrain"), time.time()
    stage.apply({"event": "start", "time": now - 20})
    stage.apply({"event": "progress", "step": 50, "total": 100, "time": now - 10})
    assert stage.left_seconds is None
    stage.apply({"event": "progress", "step": 60, "total": 100, "time": now})
    assert stage.left_seconds == pytest.approx(40.0, abs=0.5)


def test_durations_read_naturally():
    assert [format_duration(s) for s in (4.21, 187, 7500)] == ["4.2s", "3m07s", "2h05m"]


def test_summary_names_scores_intervals_seconds_and_paths():
    console = _console(terminal=False)
    print_summary(
        console, SUMMARY, report_path=Path("runs/x/report.html"), lineage_uri="sqlite:///x.db"
    )
    text = console.file.getvalue()
    assert "0.500 [0.400, 0.600]" in text
    assert "120.5" in text
    assert "runs/x/report.html" in text
    assert "sqlite:///x.db" in text
    assert "laptop abababababab" in text
