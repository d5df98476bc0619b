"""Runs on a KFP server: listed, followed with a table, read and cancelled."""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from m1.config.stages import stage_kind
from m1.tracking.progress import format_duration
from m1.types import M1Error
from pipelines.server import KfpServer, equals

ENDED = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
_COLOURS = {"SUCCEEDED": "green", "SKIPPED": "green", "FAILED": "red", "CANCELED": "yellow"}
_EXECUTOR = r"\.{task}\.executor(\(\d+\))?$"
_NODE_ANNOTATION = "workflows.argoproj.io/node-name"
_RUN_LABEL = "pipeline/runid"


@dataclass(frozen=True)
class TaskState:
    """One task of a run, as far as it has come."""

    name: str
    state: str
    seconds: float
    error: str


def find_run(server: KfpServer, text: str) -> str:
    """Id of a run given by id, or by name: the newest.

    Raises:
        M1Error: There is none.
    """
    if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text):
        return text
    runs = list_runs(server, page_size=1, filter=equals("display_name", text))
    if not runs:
        raise M1Error(f"the server has no run {text!r}, by id or by name; see `m1 runs`")
    return str(runs[0].run_id)


def list_runs(server: KfpServer, *, page_size: int, filter: str | None = None) -> list[Any]:
    """The newest runs."""
    found: Any = server.read(
        lambda client: client.list_runs(
            page_size=page_size,
            sort_by="created_at desc",
            namespace=server.connection.namespace or None,
            filter=filter,
        )
    )
    return list(found.runs or [])


def runs_table(runs: list[Any]) -> Table:
    """Runs as lines."""
    table = Table(box=None, header_style="bold")
    for column in ("name", "state", "created", "took", "id"):
        table.add_column(column)
    for run in runs:
        created = run.created_at.strftime("%Y-%m-%d %H:%M") if run.created_at else ""
        took = format_duration(_seconds(run.created_at, run.finished_at))
        table.add_row(run.display_name, _coloured(run.state), created, took, run.run_id)
    return table


def follow(
    server: KfpServer,
    run_id: str,
    *,
    console: Console,
    poll_seconds: float = 5.0,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Show a run until it ends; its last state.

    Raises:
        M1Error: The server stayed away; the run goes on.
    """
    with Live(console=console, refresh_per_second=4, transient=False) as live:
        while True:
            run: Any = server.read(lambda client: client.get_run(run_id))
            live.update(tasks_table(run))
            if run.state in ENDED:
                return str(run.state)
            sleep(poll_seconds)


def failure_of(server: KfpServer, run_id: str) -> str:
    """Why a run did not succeed, as far as the server says."""
    run: Any = server.read(lambda client: client.get_run(run_id))
    failed = [task for task in task_states(run) if task.state == "FAILED"]
    words = [f"{task.name}: {task.error or 'failed'}" for task in failed]
    if run.error is not None and run.error.message:
        words.append(run.error.message)
    return "; ".join(words) or f"the run is {run.state}"


def task_states(run: Any) -> list[TaskState]:
    """Tasks of the pipeline, without KFP's drivers and groups, in order of their start."""
    names = set(_task_names(run.pipeline_spec or {}))
    details = (run.run_details.task_details if run.run_details else None) or []
    found: dict[str, TaskState] = {}
    for task in sorted(details, key=lambda t: t.start_time or datetime.max.replace(tzinfo=UTC)):
        if not names or task.display_name in names:
            error = task.error.message if task.error is not None else ""
            seconds = _seconds(task.start_time, task.end_time)
            found[task.display_name] = TaskState(task.display_name, task.state, seconds, error)
    return list(found.values())


def tasks_table(run: Any) -> Table:
    """A run's tasks as lines."""
    table = Table(box=None, header_style="bold", title=f"{run.display_name} {run.state}")
    for column in ("task", "state", "elapsed", ""):
        table.add_column(column)
    for task in task_states(run):
        table.add_row(
            task.name, _coloured(task.state), format_duration(task.seconds), task.error or ""
        )
    return table


def task_of(server: KfpServer, run_id: str, stage: str) -> str:
    """The task of a stage: KFP numbers tasks of one component, which say their stage themselves.

    Raises:
        M1Error: The run has no such stage.
    """
    run: Any = server.read(lambda client: client.get_run(run_id))
    tasks = dict(_tasks(run.pipeline_spec or {}))
    for name, task in tasks.items():
        given = task.get("inputs", {}).get("parameters", {}).get("stage", {})
        if given.get("runtimeValue", {}).get("constant") == stage:
            return name
    if stage in tasks or not tasks:
        return stage
    raise M1Error(f"run {run_id} has no stage {stage!r}; it has: {', '.join(tasks)}")


def stage_logs(core: Any, namespace: str, run_id: str, *, task: str, stage: str) -> Iterator[str]:
    """Log lines of a stage: its component's, then those of the pods that it had made.

    Args:
        core: `kubernetes.client.CoreV1Api`.
        namespace: Where the run's pods are.
        run_id: The run.
        task: The stage's task.
        stage: The stage.

    Raises:
        M1Error: There is no pod of it any more, or yet.
    """
    pattern = re.compile(_EXECUTOR.format(task=re.escape(task)))
    listed = core.list_namespaced_pod(namespace, label_selector=f"{_RUN_LABEL}={run_id}").items
    pods = [
        (pod.metadata.name, "main")
        for pod in listed
        if pattern.search((pod.metadata.annotations or {}).get(_NODE_ANNOTATION, ""))
    ]
    selector = f"m1/run={run_id},m1/stage={stage}"
    made = core.list_namespaced_pod(namespace, label_selector=selector).items
    pods += [(pod.metadata.name, pod.spec.containers[0].name) for pod in made]
    if not pods:
        raise M1Error(
            f"run {run_id} has no pod of {stage_kind(stage)} in namespace {namespace}: it has not "
            "started, came from the cache, or its pods were deleted; the UI may hold archived logs"
        )
    for name, container in pods:
        yield f"== {name}"
        yield from core.read_namespaced_pod_log(name, namespace, container=container).splitlines()


def _tasks(spec: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Tasks of a pipeline that run a program, groups opened."""
    pipeline = spec.get("pipeline_spec", spec)
    components = pipeline.get("components", {})
    waiting = [pipeline.get("root", {}).get("dag", {})]
    while waiting:
        for name, task in waiting.pop().get("tasks", {}).items():
            reference = task.get("componentRef", {}).get("name", "")
            group = components.get(reference, {}).get("dag")
            if group is not None:
                waiting.append(group)
            else:
                yield name, task


def _task_names(spec: Mapping[str, Any]) -> list[str]:
    return [name for name, _ in _tasks(spec)]


def _seconds(start: datetime | None, end: datetime | None) -> float:
    if start is None:
        return 0.0
    # KFP writes 1970 for a time that is not yet known.
    is_over = end is not None and end.year > 1970
    return max(0.0, ((end if is_over and end else datetime.now(UTC)) - start).total_seconds())


def _coloured(state: str | None) -> str:
    colour = _COLOURS.get(state or "", "")
    return f"[{colour}]{state}[/]" if colour else str(state or "")
