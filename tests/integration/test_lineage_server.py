"""Lineage through `mlflow server`, as in a cluster; the unit tests write sqlite directly."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from faulty_proxy import faulty_proxy

from m1.config.loading import load_recipe
from m1.stage import StageOutput, execute, finished, send_pending
from m1.tracking.lineage import (
    finish_pipeline,
    link_cached_stage,
    open_stage_run,
    start_pipeline,
)
from m1.tracking.registration import register_model
from m1.tracking.store import StoreAway, open_client
from m1.types import Pointer

pytestmark = pytest.mark.slow
MINI = Path(__file__).parents[1] / "recipes" / "mini.toml"
DIGEST = "0123456789abcdef" * 4


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answers(address):
    try:
        urllib.request.urlopen(f"{address}/health", timeout=2).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("mlflow")
    folder, port = tmp_path_factory.mktemp("server"), _free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    )
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while not _answers(address):
            assert process.poll() is None, "mlflow server ended"
            assert time.monotonic() < deadline, "mlflow server did not answer within 120 s"
            time.sleep(0.5)
        yield address, folder
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def _train(uri, stage, stage_hash, parent_model=None):
    run = open_stage_run(uri=uri, experiment="m1", stage=stage, stage_hash=stage_hash)
    run.log_params({"lr": 0.1})
    run.log_dataset("corpus", source_uri="s3://bucket/tokens", digest=DIGEST)
    if parent_model:
        run.log_input_model(parent_model)
    for step in range(3):
        run.log_metrics({f"{stage}/loss": float("nan") if step == 1 else 1.0}, step=step)
    model = run.log_output_model(
        stage, checkpoint_uri=f"/runs/{stage}", step=2, parent_model_id=parent_model
    )
    run.close()
    return run.run_id, model


def test_whole_pipeline_is_recorded_by_a_server(server, monkeypatch, tmp_path):
    uri, folder = server
    parent = start_pipeline(
        uri=uri,
        experiment="m1",
        name="laptop",
        recipe_hash="e" * 64,
        recipe_json="{}",
        git_commit="",
    )
    monkeypatch.setenv("MLFLOW_RUN_ID", parent)
    _, pretrained = _train(uri, "pretrain", "a" * 64)
    sft_run, tuned = _train(uri, "sft", "b" * 64, parent_model=pretrained)
    client = open_client(uri)
    run = client.get_run(sft_run)
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert [link.model_id for link in run.inputs.model_inputs] == [pretrained]
    assert [link.model_id for link in run.outputs.model_outputs] == [tuned]

    scores = open_stage_run(uri=uri, experiment="m1", stage="evaluate", stage_hash="c" * 64)
    scores.log_scores(
        tuned, dataset_name="chain_sum", dataset_digest=DIGEST, metrics={"chain_sum/mean": 0.5}
    )
    scores.close()
    assert {"chain_sum/mean": 0.5}.items() <= {
        metric.key: metric.value for metric in client.get_logged_model(tuned).metrics
    }.items()

    options = {"uri": uri, "model_name": "m1", "source_uri": "/runs/hf", "alias": "best"}
    options |= {"model_id": tuned, "run_id": sft_run, "tags": {"stage_hash": "f" * 64}}
    version = register_model(**options)
    assert register_model(**options) == version == "1"
    assert client.get_model_version_by_alias("m1", "best").tags["source_uri"] == "/runs/hf"

    pointer = Pointer("sft", "b" * 64, "/runs/sft", DIGEST, 2, {"mlflow_run_id": sft_run})
    second = start_pipeline(
        uri=uri, experiment="m1", name="x", recipe_hash="9" * 64, recipe_json="{}", git_commit=""
    )
    linked = link_cached_stage(second, uri=uri, stage="sft", stage_hash="b" * 64, pointer=pointer)
    assert [m.model_id for m in client.get_run(linked).outputs.model_outputs] == [tuned]

    report = tmp_path / "report.html"
    report.write_text("<p>report</p>")
    finish_pipeline(
        uri=uri, run_id=parent, status="FINISHED", summary={}, report_path=report, lineage_html="x"
    )
    assert client.get_run(parent).info.status == "FINISHED"
    kept = {path.name for path in (folder / "artifacts").rglob("*") if path.is_file()}
    assert {"recipe.json", "summary.json", "lineage.html", "report.html"} <= kept


@pytest.fixture
def weak_server(server, monkeypatch):
    """A proxy before the server, with a switch: `.down(True)` resets every connection."""
    with faulty_proxy(server[0]) as (address, faults):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)

        def down(is_down):
            faults.plan("reset", 10**6 if is_down else 0)

        faults.down = down
        yield faults


def _body(before_step):
    """A stage that logs four steps, calls back before each, and leaves a model and a dataset."""

    def body(context, recipe):
        for step in range(1, 5):
            before_step(step)
            context.log({f"{context.name}/loss": 1.0 / step}, step=step, total=4)
        (context.output / "tasks").mkdir(parents=True)
        (context.output / "tasks" / "file").write_text(context.name)
        return StageOutput(step=4, is_model=context.name != "data", datasets=("tasks",))

    return body


def _is_whole(pointer, stage, parent=None):
    """That the server has all that the stage recorded, and that its pointer names it."""
    client = open_client(os.environ["MLFLOW_TRACKING_URI"])
    run = client.get_run(pointer.metadata["mlflow_run_id"])
    assert run.info.status == "FINISHED" and run.data.tags["m1.stage"] == stage
    assert run.data.params["seed"] == "1"
    history = client.get_metric_history(run.info.run_id, f"{stage}/loss")
    assert [(m.step, m.value) for m in history] == [(n, 1.0 / n) for n in range(1, 5)]
    names = [d.dataset.name for d in run.inputs.dataset_inputs]
    assert names == (["tasks"] if stage == "data" else ["data", "tasks"])
    if stage != "data":
        model = client.get_logged_model(pointer.metadata["model_id"])
        assert model.status == "READY" and model.tags["checkpoint_uri"] == pointer.uri
        assert model.tags.get("parent_model_id") == parent
        assert [m.model_id for m in run.inputs.model_inputs] == ([parent] if parent else [])
    return True


@pytest.mark.parametrize(
    ("down_at", "up_at"),
    [
        (0, None),
        (2, 3),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in [(0, 3), (2, None), (4, None)]
        ),
    ],
    ids=str,
)
def test_training_goes_on_without_the_server_and_its_records_arrive_later(
    weak_server, tmp_path, down_at, up_at
):
    sets = [f"storage.root={tmp_path}", f"tracking.experiment=weak-{down_at}-{up_at}"]
    recipe = load_recipe([MINI], overrides=sets)

    def before_step(step):
        if step == down_at:
            weak_server.down(True)
        if step == up_at:
            weak_server.down(False)

    weak_server.down(down_at == 0)
    execute("data", recipe, _body(before_step))
    pointers = {"data": finished("data", recipe)}
    if up_at is None:
        weak_server.down(True)
        for stage in ("pretrain", "sft"):  # begun while it is away
            execute(stage, recipe, _body(lambda step: None))
        assert finished("sft", recipe).metadata["model_id"].startswith("pending:")
        with pytest.raises(StoreAway):
            send_pending(recipe)
        weak_server.down(False)
        assert send_pending(recipe)[-2:] == ["pretrain", "sft"]
        pointers = {stage: finished(stage, recipe) for stage in ("data", "pretrain", "sft")}
    parents = {"sft": pointers["pretrain"].metadata["model_id"]} if len(pointers) > 1 else {}
    for stage, pointer in pointers.items():
        assert _is_whole(pointer, stage, parents.get(stage))
    assert not list(tmp_path.rglob("lineage.jsonl"))
    assert send_pending(recipe) == []


def test_a_registration_while_the_server_is_away_says_so(weak_server):
    uri = os.environ["MLFLOW_TRACKING_URI"]
    open_client(uri)
    weak_server.down(True)
    with pytest.raises(StoreAway, match="run the same command when it is back"):
        register_model(uri=uri, model_name="x", source_uri="/x", alias="best")


def test_a_task_of_kubeflow_uses_the_run_that_its_plugin_made(weak_server, tmp_path, monkeypatch):
    client = open_client(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.create_experiment("of-kubeflow")
    parent = client.create_run(experiment, run_name="pipeline of KFP")
    tags = {"mlflow.parentRunId": parent.info.run_id}
    task = client.create_run(experiment, run_name="task of KFP", tags=tags)
    monkeypatch.setenv("MLFLOW_RUN_ID", task.info.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    recipe = load_recipe([MINI], overrides=[f"storage.root={tmp_path}"])
    pointer = execute("data", recipe, _body(lambda step: None))
    assert pointer.metadata["mlflow_run_id"] == task.info.run_id
    run = client.get_run(task.info.run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.data.tags["m1.stage_hash"] == pointer.stage_hash
    assert json.loads(run.inputs.dataset_inputs[0].dataset.source)["uri"].startswith(pointer.uri)
