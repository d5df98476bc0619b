"""Lineage through `mlflow server`, as in a cluster; the unit tests write sqlite directly."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from m1.tracking.lineage import (
    finish_pipeline,
    link_cached_stage,
    open_stage_run,
    register_model,
    start_pipeline,
)
from m1.tracking.store import open_client
from m1.types import Pointer

pytestmark = pytest.mark.slow
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
