import json
import shutil
import subprocess
import sys

import pytest

from m1.config.schema import TrackingConfig
from m1.tracking.lineage import (
    finish_pipeline,
    lineage_page,
    link_cached_stage,
    open_stage_run,
    start_pipeline,
    tracking_uri,
)
from m1.tracking.registration import register_model
from m1.tracking.store import open_client
from m1.types import M1Error, Pointer

HASHES = {"data": "d" * 64, "pretrain": "a" * 64, "sft": "b" * 64}
DIGEST = "0123456789abcdef" * 4


@pytest.fixture(scope="session")
def fresh_database(tmp_path_factory):
    """A store with its tables made, which takes seconds; tests copy it."""
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("mlflow")
    open_client(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def uri(tmp_path, fresh_database, monkeypatch):
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(fresh_database, tmp_path / "mlflow.db")
    return tracking_uri(TrackingConfig(), tmp_path)


@pytest.fixture
def parent(uri):
    return _start(uri)


def _start(uri, **options):
    return start_pipeline(
        uri=uri,
        experiment="m1",
        name="laptop",
        recipe_hash="e" * 64,
        recipe_json='{"name": "laptop"}',
        git_commit="c0ffee",
        **options,
    )


def _open(uri, stage, **options):
    return open_stage_run(
        uri=uri, experiment="m1", stage=stage, stage_hash=HASHES[stage], **options
    )


def _train(uri, stage, *, parent_model=None):
    run = _open(uri, stage)
    run.log_dataset("corpus", source_uri="s3://bucket/tokens", digest=DIGEST)
    if parent_model:
        run.log_input_model(parent_model)
    for step in range(3):
        run.log_metrics({f"{stage}/loss": 1.0 / (step + 1)}, step=step)
    model = run.log_output_model(
        stage,
        checkpoint_uri=f"/runs/{stage}/step-2",
        step=2,
        parent_model_id=parent_model,
        params={"layers": 2},
    )
    run.close()
    return run.run_id, model


def _pointer(stage, run_id):
    return Pointer(stage, HASHES[stage], f"/runs/{stage}", DIGEST, 2, {"mlflow_run_id": run_id})


def test_environment_then_recipe_then_file_name_the_store(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(TrackingConfig(), tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri(TrackingConfig(uri="http://a"), tmp_path) == "http://a"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://b")
    assert tracking_uri(TrackingConfig(uri="http://a"), tmp_path) == "http://b"


def test_importing_lineage_does_not_import_mlflow():
    code = "import sys, m1.tracking.lineage; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pipeline_run_carries_recipe_and_is_resumed(uri, parent, tmp_path):
    client = open_client(uri)
    run = client.get_run(parent)
    assert run.data.tags["m1.recipe_hash"] == "e" * 64
    assert run.data.tags["m1.git_commit"] == "c0ffee"
    assert run.info.run_name == "laptop-eeeeeeeeeeee"
    [recipe] = (tmp_path / "mlartifacts").rglob("recipe.json")
    assert json.loads(recipe.read_text()) == {"name": "laptop"}
    client.set_terminated(parent, status="FAILED")
    assert _start(uri, existing_run_id=parent) == parent
    assert client.get_run(parent).info.status == "RUNNING"
    assert _start(uri, existing_run_id="f" * 32) != parent


def test_models_link_back_to_the_data(uri, parent, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", parent)
    pretrain_run, pretrained = _train(uri, "pretrain")
    sft_run, tuned = _train(uri, "sft", parent_model=pretrained)
    client = open_client(uri)
    run = client.get_run(sft_run)
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.info.run_name == "sft-bbbbbbbbbbbb"
    assert run.info.status == "FINISHED"
    assert [link.model_id for link in run.inputs.model_inputs] == [pretrained]
    assert [link.model_id for link in run.outputs.model_outputs] == [tuned]
    model = client.get_logged_model(tuned)
    assert model.status == "READY"
    assert model.source_run_id == sft_run
    assert model.tags["parent_model_id"] == pretrained
    assert model.tags["stage_hash"] == HASHES["sft"]
    assert client.get_logged_model(pretrained).source_run_id == pretrain_run
    [data] = run.inputs.dataset_inputs
    assert json.loads(data.dataset.source) == {"uri": "s3://bucket/tokens"}
    assert data.dataset.digest == DIGEST[:36]
    assert {tag.key: tag.value for tag in data.tags}["m1.digest"] == DIGEST


def test_output_model_shows_the_last_metrics_on_its_dataset(uri):
    _, model = _train(uri, "pretrain")
    [metric] = open_client(uri).get_logged_model(model).metrics
    assert (metric.key, metric.step, metric.dataset_name) == ("pretrain/loss", 2, "corpus")
    assert metric.value == pytest.approx(1 / 3)


def test_interrupted_stage_resumes_its_run_without_repeating_steps(uri, parent, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", parent)
    first = _open(uri, "pretrain")
    first.log_params({"lr": 0.1, "model": {"layers": 2}})
    for step in range(4):
        first.log_metrics({"pretrain/loss": 4.0 - step}, step=step)
    first.close("FAILED")
    second = _open(uri, "pretrain")
    assert second.run_id == first.run_id
    second.log_params({"lr": 0.1, "model": {"layers": 2}, "extra": True})
    for step in range(2, 6):
        second.log_metrics({"pretrain/loss": 4.0 - step, "pretrain/new": 1.0}, step=step)
    second.close()
    client = open_client(uri)
    history = client.get_metric_history(second.run_id, "pretrain/loss")
    assert [(m.step, m.value) for m in history] == [(step, 4.0 - step) for step in range(6)]
    new = client.get_metric_history(second.run_id, "pretrain/new")
    assert [m.step for m in new] == [2, 3, 4, 5]
    params = client.get_run(second.run_id).data.params
    assert params == {"lr": "0.1", "model.layers": "2", "extra": "True"}


def test_resumed_stage_records_its_checkpoint_once(uri):
    run = _open(uri, "pretrain")
    model = run.log_output_model("pretrain", checkpoint_uri="/x/step-2", step=2)
    run.close("KILLED")
    again = _open(uri, "pretrain")
    assert again.run_id == run.run_id
    assert again.log_output_model("pretrain", checkpoint_uri="/x/step-2", step=2) == model


def test_finished_run_is_not_resumed(uri):
    run_id, _ = _train(uri, "pretrain")
    assert _open(uri, "pretrain").run_id != run_id


def test_tasks_own_run_is_used_as_it_is(uri, parent, monkeypatch):
    client = open_client(uri)
    experiment = client.get_run(parent).info.experiment_id
    own = client.create_run(experiment, tags={"mlflow.parentRunId": parent}).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", own)
    run = _open(uri, "pretrain", tags={"kfp.task": "x"})
    assert run.run_id == own
    tags = client.get_run(own).data.tags
    assert (tags["m1.stage_hash"], tags["kfp.task"]) == (HASHES["pretrain"], "x")


def test_unknown_run_id_names_the_mistake(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "f" * 32)
    with pytest.raises(M1Error, match=r"MLFLOW_RUN_ID is f+, but the store"):
        _open(uri, "pretrain")


def test_server_that_does_not_answer_names_the_mistake():
    with pytest.raises(M1Error, match="nothing answers there"):
        open_client("http://127.0.0.1:9")


def test_cached_stage_is_linked_once_to_what_made_it(uri, parent):
    run_id, model = _train(uri, "pretrain")
    options = {
        "uri": uri,
        "stage": "pretrain",
        "stage_hash": HASHES["pretrain"],
        "pointer": _pointer("pretrain", run_id),
        "seconds": 12.5,
    }
    linked = link_cached_stage(parent, **options)
    assert link_cached_stage(parent, **options) == linked != run_id
    run = open_client(uri).get_run(linked)
    assert run.info.status == "FINISHED"
    assert run.data.tags["m1.cached"] == "true"
    assert run.data.tags["m1.stage_run_id"] == run_id
    assert [link.model_id for link in run.outputs.model_outputs] == [model]
    assert [link.dataset.name for link in run.inputs.dataset_inputs] == ["corpus"]
    assert link_cached_stage(_start(uri), **options) != linked


def test_cached_stage_of_another_store_is_still_shown(uri, parent):
    pointer = _pointer("pretrain", "f" * 32)
    linked = link_cached_stage(
        parent, uri=uri, stage="pretrain", stage_hash=HASHES["pretrain"], pointer=pointer
    )
    assert open_client(uri).get_run(linked).data.tags["checkpoint_uri"] == "/runs/pretrain"


def test_stage_of_this_pipeline_is_not_linked_again(uri, parent, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", parent)
    run_id, _ = _train(uri, "pretrain")
    linked = link_cached_stage(
        parent,
        uri=uri,
        stage="pretrain",
        stage_hash=HASHES["pretrain"],
        pointer=_pointer("pretrain", run_id),
    )
    assert linked == run_id


def test_scores_of_several_models_stay_apart(uri):
    _, first = _train(uri, "pretrain")
    _, second = _train(uri, "sft", parent_model=first)
    run = _open(uri, "data")
    for model, score in ((first, 0.1), (second, 0.6)):
        run.log_scores(
            model,
            dataset_name="chain_sum",
            dataset_digest=DIGEST,
            metrics={"chain_sum/pass@4": score},
        )
    run.close()
    client = open_client(uri)
    scores = {m.key: m.value for m in client.get_logged_model(second).metrics}
    assert scores["chain_sum/pass_at_4"] == 0.6
    history = client.get_metric_history(run.run_id, "chain_sum/pass_at_4")
    assert [(m.step, m.value) for m in history] == [(0, 0.1), (1, 0.6)]


def test_model_of_another_store_does_not_stop_evaluation_or_registration(uri):
    absent = "m-" + "0" * 32
    run = _open(uri, "sft")
    run.log_input_model(absent)
    run.log_scores(absent, dataset_name="x", dataset_digest=DIGEST, metrics={"x/mean": 0.5})
    run.close()
    assert open_client(uri).get_run(run.run_id).data.metrics == {"x/mean": 0.5}
    options = {"uri": uri, "model_name": "m1-tiny", "source_uri": "/x", "alias": "best"}
    assert register_model(**options, model_id=absent) == "1"


def test_registration_happens_once_per_stage_hash(uri):
    run_id, model = _train(uri, "sft")
    options = {"uri": uri, "model_name": "m1-tiny", "alias": "best", "model_id": model}
    tags = {"stage_hash": HASHES["sft"]}
    one = register_model(**options, source_uri="/runs/export", run_id=run_id, tags=tags)
    assert register_model(**options, source_uri="/runs/export", run_id=run_id, tags=tags) == one
    two = register_model(**options, source_uri="s3://b/export", tags={"stage_hash": "9" * 64})
    assert (one, two) == ("1", "2")
    client = open_client(uri)
    assert client.get_model_version("m1-tiny", one).tags["source_uri"] == "/runs/export"
    best = client.get_model_version_by_alias("m1-tiny", "best")
    assert (str(best.version), best.source) == ("2", "s3://b/export")


def test_reserved_aliases_are_left_out_or_explained(uri):
    options = {"uri": uri, "model_name": "m1-tiny", "source_uri": "s3://b/export"}
    assert register_model(**options, alias="latest") == "1"
    with pytest.raises(M1Error, match=r"register.alias is 'v7'"):
        register_model(**options, alias="v7")


def test_finished_pipeline_keeps_its_pages(uri, parent, tmp_path):
    pointers = {"data": _pointer("data", "1" * 32), "pretrain": _pointer("pretrain", "2" * 32)}
    summary = {
        "recipe": "laptop",
        "recipe_hash": "e" * 64,
        "git_commit": "",
        "wall_seconds": 61.0,
        "stages": {
            "data": {"hash": HASHES["data"], "status": "cached", "seconds": 3.0},
            "pretrain": {"hash": HASHES["pretrain"], "status": "done", "seconds": 58.0},
        },
        "scores": {"chain_sum": {"rl": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 10}}},
    }
    page = lineage_page(pointers, summary=summary, tracking=uri, run_id=parent)
    for needed in (HASHES["data"], HASHES["pretrain"], DIGEST, "/runs/pretrain", "2" * 32, parent):
        assert needed in page
    assert "<svg" in page
    report = tmp_path / "report.html"
    report.write_text("<p>report</p>")
    finish_pipeline(
        uri=uri,
        run_id=parent,
        status="FINISHED",
        summary=summary,
        lineage_html=page,
        report_path=report,
        figures={"scores": "<svg/>"},
    )
    run = open_client(uri).get_run(parent)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["score/chain_sum/rl"] == 0.5
    kept = {path.name for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file()}
    assert kept == {"recipe.json", "summary.json", "lineage.html", "report.html", "scores.svg"}
