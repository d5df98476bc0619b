"""From a recipe to a run on a KFP server; a version is uploaded once for each content."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1.config.schema import Recipe
from m1.types import M1Error
from pipelines.compile import compile_pipeline, version_of
from pipelines.server import KfpError, KfpServer, equals

FAILED_STATES = ("FAILED", "CANCELED", "CANCELING")
_CONFLICT = 409


@dataclass(frozen=True)
class Order:
    """What to run."""

    only: str = ""
    """Part of the pipeline; empty: all."""
    checkpoint: str = ""
    """Where a part begins."""
    overrides: tuple[str, ...] = ()
    """`dotted.key=value`, applied by the run itself; the version stays the same."""
    run_name: str = ""
    """Empty: the version's name."""
    priority: str = ""
    """WorkloadPriorityClass."""
    pipeline_root: str = ""
    """Where KFP keeps artifacts; empty: its default."""
    service_account: str = ""
    """Of the run's pods; empty: KFP's default."""
    once: bool = False
    """Whether a version that has a run which did not fail is left alone."""


@dataclass(frozen=True)
class Submission:
    """What came of it."""

    run_id: str
    version: str
    is_uploaded: bool
    """Whether the version is new."""
    is_started: bool
    """Whether the run is; False where `once` found one."""
    url: str
    """Of the run in the UI."""


def submit(recipe: Recipe, server: KfpServer, order: Order) -> Submission:
    """Upload the recipe's pipeline unless the server has it, and run it.

    Raises:
        M1Error: The server refused, or stayed away.
    """
    if order.only in ("rl", "evaluate") and not order.checkpoint:
        raise M1Error(f"a run of {order.only} only starts from a checkpoint; give --checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compile_pipeline(recipe, path, order.only)
        version = version_of(path, recipe)
        pipeline_id = _pipeline(server, version.rpartition("-")[0], recipe)
        version_id = _find_version(server, pipeline_id, version)
        is_new = version_id is None
        if version_id is None:
            version_id = _upload(server, pipeline_id, version, path)
    experiment = _experiment(server, recipe.tracking.experiment)
    name = order.run_name or version
    found = _earlier_run(server, experiment, version_id) if order.once else None
    if found is not None:
        return Submission(found, version, is_new, False, run_url(server, found))
    parameters = {
        "checkpoint": order.checkpoint,
        "overrides": "\n".join(order.overrides),
        "run_name": order.run_name,
        "priority": order.priority,
    }
    run: Any = server.write(
        lambda client: client.run_pipeline(
            experiment_id=experiment,
            job_name=name,
            pipeline_id=pipeline_id,
            version_id=version_id,
            params={key: value for key, value in parameters.items() if value},
            pipeline_root=order.pipeline_root or None,
            service_account=order.service_account or None,
        )
    )
    return Submission(run.run_id, version, is_new, True, run_url(server, run.run_id))


def run_url(server: KfpServer, run_id: str) -> str:
    """The run in KFP's UI."""
    return f"{server.connection.ui_url}/#/runs/details/{run_id}"


def _pipeline(server: KfpServer, name: str, recipe: Recipe) -> str:
    """Id of the pipeline of a name, made if there is none."""
    from kfp_server_api import V2beta1Pipeline

    space = server.connection.namespace or None

    def find() -> str | None:
        listed: Any = server.read(
            lambda client: client.list_pipelines(
                namespace=space, filter=equals("display_name", name)
            )
        )
        return str(listed.pipelines[0].pipeline_id) if listed.pipelines else None

    body = V2beta1Pipeline(
        name=name,
        display_name=name,
        namespace=space,
        description=f"Recipe {recipe.name}, compiled by m1 submit",
    )
    found = find()
    if found is not None:
        return found
    try:
        made: Any = server.write(
            lambda client: client.pipelines.pipeline_service_create_pipeline(pipeline=body)
        )
        return str(made.pipeline_id)
    except KfpError as error:
        found = find() if error.status == _CONFLICT else None  # another submit was first
        if found is None:
            raise
        return found


def _find_version(server: KfpServer, pipeline_id: str, name: str) -> str | None:
    listed: Any = server.read(
        lambda client: client.list_pipeline_versions(
            pipeline_id=pipeline_id, filter=equals("display_name", name)
        )
    )
    versions = listed.pipeline_versions or []
    return str(versions[0].pipeline_version_id) if versions else None


def _upload(server: KfpServer, pipeline_id: str, name: str, path: Path) -> str:
    try:
        made: Any = server.write(
            lambda client: client.upload_pipeline_version(
                str(path), pipeline_version_name=name, pipeline_id=pipeline_id
            )
        )
        return str(made.pipeline_version_id)
    except KfpError as error:
        # Another submit was first, or the answer to ours was lost.
        found = _find_version(server, pipeline_id, name) if error.status in (0, 409) else None
        if found is None:
            raise
        return found


def _experiment(server: KfpServer, name: str) -> str:
    space = server.connection.namespace or None
    made: Any = server.write(lambda client: client.create_experiment(name, namespace=space))
    return str(made.experiment_id)


def _earlier_run(server: KfpServer, experiment: str, version_id: str) -> str | None:
    """The newest run of a version that did not fail."""
    token = ""
    while True:
        listed: Any = server.read(
            lambda client, token=token: client.list_runs(
                experiment_id=experiment,
                page_token=token,
                page_size=100,
                sort_by="created_at desc",
            )
        )
        for run in listed.runs or []:
            reference = run.pipeline_version_reference
            is_same = reference is not None and reference.pipeline_version_id == version_id
            if is_same and run.state not in FAILED_STATES:
                return str(run.run_id)
        token = listed.next_page_token or ""
        if not token:
            return None
