"""What a person sees of a pipeline run: one live row per stage, then a table of scores."""

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, ConsoleRenderable
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from m1.tracking.events import read_events
from m1.tracking.progress import StageProgress, format_duration

_POLL_SECONDS = 0.25
_PLAIN_INTERVAL_SECONDS = 10.0
_STYLES = {
    "waiting": "dim",
    "running": "bold cyan",
    "done": "green",
    "cached": "blue",
    "failed": "bold red",
}


class PipelineDisplay:
    """Follows an events file while the pipeline runs; a context manager.

    In a terminal it keeps one table up to date. Elsewhere (logs, CI) it prints a line when a stage
    starts or ends, and at most one line of progress every 10 s.
    """

    def __init__(self, stages: Sequence[str], events_path: Path, console: Console) -> None:
        self._progress = {stage: StageProgress(stage) for stage in stages}
        self._path = events_path
        self._console = console
        self._offset = events_path.stat().st_size if events_path.exists() else 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="m1-display", daemon=True)
        self._last_plain = 0.0
        self._live = (
            Live(console=console, get_renderable=self._render, refresh_per_second=4)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        """Start following; events written before are not shown."""
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Show what is left in the file, then stop."""
        self._stopping.set()
        self._thread.join()
        self._read()
        if self._live:
            self._live.stop()

    def _follow(self) -> None:
        while not self._stopping.wait(_POLL_SECONDS):
            self._read()

    def _read(self) -> None:
        with self._lock:
            events, self._offset = read_events(self._path, self._offset)
            for event in events:
                progress = self._progress.get(event["stage"])
                if progress is None:
                    continue
                progress.apply(event)
                if self._live is None:
                    self._print_plain(progress, event["event"])

    def _print_plain(self, progress: StageProgress, kind: str) -> None:
        now = time.monotonic()
        if kind == "progress" and now - self._last_plain < _PLAIN_INTERVAL_SECONDS:
            return
        self._last_plain = now
        self._console.print(progress.plain_line(), markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> ConsoleRenderable:
        with self._lock:
            return _progress_table(list(self._progress.values()))


def _progress_table(stages: Sequence[StageProgress]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("stage", "state", "", "step", "metric", "tokens/s", "elapsed", "left"):
        is_number = title in ("step", "tokens/s", "elapsed", "left")
        table.add_column(title, justify="right" if is_number else "left", no_wrap=True)
    for stage in stages:
        table.add_row(
            Text(stage.name, style="bold" if stage.state == "running" else ""),
            Text(stage.state, style=_STYLES[stage.state]),
            _bar(stage),
            stage.step_text,
            Text(stage.message if stage.state == "failed" else stage.metric_text),
            stage.speed_text,
            format_duration(stage.elapsed_seconds) if stage.started else "",
            format_duration(stage.left_seconds) if stage.left_seconds is not None else "",
        )
    return table


def _bar(stage: StageProgress) -> ConsoleRenderable:
    if stage.state != "running":
        return Text(stage.phase if stage.state == "failed" else "")
    if stage.total:
        return ProgressBar(total=stage.total, completed=stage.step, width=24)
    return Text(stage.phase or "…", style="dim")


def print_summary(
    console: Console,
    summary: Mapping[str, Any],
    *,
    report_path: Path | None = None,
    lineage_uri: str | None = None,
) -> None:
    """Print the end of a run: seconds per stage, scores with intervals, and where to look next.

    Args:
        console: Where to print.
        summary: The run's summary.json.
        report_path: The HTML report.
        lineage_uri: The MLflow store.
    """
    console.print(_stages_table(summary))
    if summary.get("scores"):
        console.print(_scores_table(summary["scores"]))
    paths = Table(box=None, show_header=False, pad_edge=False)
    if report_path is not None:
        paths.add_row("report", Text(str(report_path)))
    if lineage_uri is not None:
        paths.add_row("lineage", Text(f"{lineage_uri}   (m1 ui)"))
    console.print(paths)


def _stages_table(summary: Mapping[str, Any]) -> Table:
    wall = format_duration(float(summary.get("wall_seconds", 0.0)))
    short = str(summary.get("recipe_hash", ""))[:12]
    table = Table(
        title=f"{summary.get('recipe', 'run')} {short}: {wall}", box=None, title_justify="left"
    )
    table.add_column("stage")
    table.add_column("state")
    table.add_column("seconds", justify="right")
    table.add_column("hash", style="dim")
    for name, stage in summary.get("stages", {}).items():
        state = stage["status"]
        table.add_row(
            name,
            Text(state, style=_STYLES.get(state, "")),
            f"{stage.get('seconds', 0.0):.1f}",
            str(stage.get("hash", ""))[:12],
        )
    return table


def _scores_table(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    models = list(dict.fromkeys(model for row in scores.values() for model in row))
    table = Table(title="Scores: mean [interval]", box=None, title_justify="left")
    table.add_column("benchmark")
    for model in models:
        table.add_column(model, justify="right", no_wrap=True)
    for benchmark, row in scores.items():
        table.add_row(benchmark, *(_score_text(row.get(model)) for model in models))
    return table


def _score_text(score: Mapping[str, Any] | None) -> Text:
    if score is None:
        return Text("-", style="dim")
    return Text(f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]")
