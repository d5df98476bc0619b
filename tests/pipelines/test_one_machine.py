"""The profile one-machine: the compiled pipeline on a real S3 server and a real MLflow server."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from m1.config.loading import load_recipe
from m1.launch import finished_stages
from m1.pipeline import load_pipelines
from m1.profiles import Profile, use_profile
from m1.services import BUCKET, Services
from m1.storage import open_storage
from m1.tracking.lineage import start_pipeline
from m1.tracking.store import open_client
from m1.types import M1Error

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from browser import browser_page

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]
ROOT = Path(__file__).parents[2]
MINI = ROOT / "tests/recipes/mini.toml"
PLANTED = "planted-secret-5f1c0a"
STAGES = ("data", "pretrain", "sft", "rl", "evaluate", "register")
SCREENSHOTS = os.environ.get("M1_SCREENSHOTS")
"""Folder that gets pictures of the pages, as the documentation shows them."""


@pytest.fixture(scope="module")
def services(m1, tmp_path_factory):
    root = tmp_path_factory.mktemp("one_machine")
    for name in ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "OPENAI_API_KEY"):
        os.environ[name] = PLANTED
    os.environ["MLFLOW_TRACKING_USERNAME"] = "someone"
    started = m1("up", "--root", str(root))
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        yield Services(root)
    finally:
        stopped = m1("down", "--root", str(root))
        for name in ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "OPENAI_API_KEY"):
            del os.environ[name]
        del os.environ["MLFLOW_TRACKING_USERNAME"]
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
        assert m1("status", "--root", str(root)).returncode == 1


@pytest.fixture(scope="module")
def root(services) -> Path:
    return services.folder.parent


@pytest.fixture(scope="module")
def compiled(services, root, tmp_path_factory):
    """The first two stages, run from the compiled YAML; the recipe and the file."""
    recipe = load_recipe([MINI], overrides=[f"storage.root={root}"])
    folder = tmp_path_factory.mktemp("compiled")
    with use_profile(Profile.ONE_MACHINE, recipe) as placed:
        dropped = {"sft": None, "rl": None, "evaluate": None, "register_": None}
        first = placed.model_copy(update=dropped)
        load_pipelines("compile").compile_pipeline(first, folder / "pipeline.yaml")
        parent = start_pipeline(
            uri=services.mlflow_uri,
            experiment="compiled",
            name="compiled",
            recipe_hash="c" * 64,
            recipe_json="{}",
            git_commit="",
        )
        os.environ["MLFLOW_RUN_ID"] = parent
        try:
            load_pipelines("local").run_compiled(
                folder / "pipeline.yaml", pipeline_root=folder / "kfp", log=folder / "log.txt"
            )
        finally:
            del os.environ["MLFLOW_RUN_ID"]
        pointers = finished_stages(first)
    return folder, parent, pointers


@pytest.fixture(scope="module")
def whole(compiled, m1, root):
    """The whole recipe through `m1 run --profile one-machine`; its output and summary."""
    ran = m1("run", str(MINI), "--profile", "one-machine", "--set", f"storage.root={root}")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran, json.loads((root / "latest" / "summary.json").read_text())


def test_the_compiled_yaml_puts_artifacts_in_s3_and_lineage_in_mlflow(compiled, services):
    _, parent, pointers = compiled
    assert list(pointers) == ["data", "pretrain"]
    client = open_client(services.mlflow_uri)
    for stage, pointer in pointers.items():
        assert pointer.uri.startswith(f"s3://{BUCKET}/runs/stages/{stage}-")
        run = client.get_run(pointer.metadata["mlflow_run_id"])
        assert run.data.tags["mlflow.parentRunId"] == parent
        assert run.data.tags["m1.pointer_uri"].startswith(f"s3://{BUCKET}/runs/stages/{stage}-")
        assert run.info.status == "FINISHED"
    model = client.get_logged_model(pointers["pretrain"].metadata["model_id"])
    assert model.tags["checkpoint_uri"] == pointers["pretrain"].uri


def test_a_run_finds_what_the_compiled_one_did_and_does_the_rest(whole, services):
    ran, summary = whole
    states = {stage: facts["status"] for stage, facts in summary["stages"].items()}
    assert states == dict.fromkeys(STAGES, "done") | {"data": "cached", "pretrain": "cached"}
    assert services.mlflow_uri in ran.stdout
    for facts in summary["stages"].values():
        assert facts["outputs"]["uri"].startswith(f"s3://{BUCKET}/runs/")
    with use_profile(Profile.ONE_MACHINE, load_recipe([MINI], overrides=[_root(services)])):
        kept = open_storage(f"s3://{BUCKET}").list()
    assert any(re.search(r"runs/stages/rl-.*/output/checkpoint/", key) for key in kept)
    assert any(re.search(r"mlflow/.*/report.html", key) for key in kept)  # MLflow's artifacts


def _root(services) -> str:
    return f"storage.root={services.folder.parent}"


def test_lineage_leads_from_the_registered_model_to_the_data_and_to_its_scores(
    whole, m1, root, tmp_path
):
    page = tmp_path / "lineage.html"
    options = ["--root", str(root), "--profile", "one-machine"]
    found = m1("lineage", "models:/m1-mini@champion", *options, "--json", "--html", str(page))
    assert found.returncode == 0, found.stderr
    chain = json.loads(found.stdout)
    assert list(chain["back"]) == ["data", "pretrain", "sft", "rl"]
    assert chain["versions"] == ["m1-mini v1 (champion)"]
    assert [(e["benchmark"], e["n"]) for e in chain["evaluations"]] == [("sums", 10)]
    assert {name.split("-")[0] for name in chain["forward"]} == {"evaluate", "register"}
    for facts in chain["back"].values():
        assert facts["image"].startswith("source:") and len(facts["config"]) == 64
    rl = chain["back"]["rl"]
    assert rl["inputs"]["sft"]["model_id"] == chain["back"]["sft"]["model_id"]
    shown = m1("lineage", rl["uri"], *options)
    assert shown.returncode == 0 and "pretrain" in shown.stdout and "sums" in shown.stdout
    html = page.read_text()
    assert html.count("<rect") >= 8 and "source:" in html and "Evaluations" in html


def test_the_browser_finds_the_run_its_stages_and_figures(whole, services, root):
    client = open_client(services.mlflow_uri)
    experiment = client.get_experiment_by_name("m1").experiment_id
    parents = [
        run for run in client.search_runs([experiment]) if "mlflow.parentRunId" not in run.data.tags
    ]
    (parent,) = parents
    base = f"{services.mlflow_uri}/#/experiments/{experiment}/runs"
    with browser_page() as page:
        page.set_default_timeout(60_000)
        page.goto(base)
        page.get_by_text(parent.info.run_name, exact=True).wait_for()
        _picture(page, "mlflow_runs")
        children = client.search_runs(
            [experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
        )
        assert {run.data.tags["m1.stage"] for run in children} == set(STAGES)
        for run in children:
            page.goto(f"{base}/{run.info.run_id}")
            page.get_by_text(run.info.run_name).first.wait_for()
            page.get_by_text("m1.stage_hash").first.wait_for()
        page.goto("about:blank")  # a change behind # alone does not load the page again
        page.goto(f"{base}/{parent.info.run_id}/artifacts")
        for name in ("figures", "lineage.html", "report.html", "summary.json"):
            page.get_by_text(name, exact=True).wait_for()
        page.get_by_text("figures", exact=True).click()
        page.get_by_text("rl.svg").wait_for()
        page.get_by_text("lineage.html", exact=True).click()
        page.wait_for_timeout(3000)
        _picture(page, "mlflow_lineage")
        page.goto((root / "latest" / "report.html").resolve().as_uri())
        assert page.locator("svg").count() >= 4
        for stage in STAGES:
            assert page.get_by_text(stage, exact=True).count() >= 1
        _picture(page, "report")


def _picture(page, name: str) -> None:
    if SCREENSHOTS:
        page.screenshot(path=str(Path(SCREENSHOTS) / f"{name}.png"))


def test_no_secret_is_written_anywhere_but_among_the_secrets(whole, compiled, services, root):
    secrets = {PLANTED.encode()}
    for name in ("access_key", "secret_key"):
        path = services.folder / "secrets" / name
        assert path.stat().st_mode & 0o077 == 0
        secrets.add(path.read_bytes())
    ran, folder = whole[0], compiled[0]
    places = [path for base in (root, folder) for path in base.rglob("*") if path.is_file()]
    places = [path for path in places if services.folder / "secrets" not in path.parents]
    assert any(path.suffix == ".yaml" for path in places) and any(
        path.name == "mlflow.db" for path in places
    )
    assert any(path.suffix == ".dat" for path in places)  # the S3 server's own files
    texts = {str(path): path.read_bytes() for path in places} | {
        "stdout": (ran.stdout + ran.stderr).encode()
    }
    found = [name for name, text in texts.items() for secret in secrets if secret in text]
    assert found == []


def test_the_supervisor_starts_a_service_again_that_died(services):
    def state(name):
        return next(s for s in services.status() if s.name == name)

    (pid,) = re.findall(r"pid (\d+)", state("mlflow").detail)
    os.kill(int(pid), signal.SIGKILL)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        again = state("mlflow")
        is_new = again.state == "RUNNING" and f"pid {pid}," not in again.detail
        if is_new and again.is_answering:  # else a child of the killed one may answer
            break
        time.sleep(1)
    assert is_new and again.is_answering and not psutil.pid_exists(int(pid))
    (new,) = re.findall(r"pid (\d+)", again.detail)
    answering = {
        process
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
        and connection.laddr.port == services.ports["mlflow"]
        for process in (connection.pid, *(p.pid for p in psutil.Process(connection.pid).parents()))
    }
    assert int(new) in answering  # not a child that the killed one left on the port


def test_a_detached_run_is_a_program_of_the_supervisor(whole, m1, root, services):
    options = ["--profile", "one-machine", "--set", f"storage.root={root}"]
    ran = m1("run", str(MINI), *options, "--detach")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    log = services.folder / "logs" / "run-mini.log"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        state = next(s for s in services.status() if s.name == "run-mini")
        if state.state == "EXITED":
            break
        time.sleep(1)
    assert state.state == "EXITED" and "Scores" in log.read_text()


def test_the_profile_without_services_says_what_to_start(tmp_path):
    recipe = load_recipe([MINI], overrides=[f"storage.root={tmp_path}"])
    with (
        pytest.raises(M1Error, match=r"needs s3 and mlflow .*m1 up --root"),
        use_profile(Profile.ONE_MACHINE, recipe),
    ):
        pass
    with pytest.raises(M1Error, match="m1 submit"), use_profile(Profile.CLUSTER, recipe):
        pass
    finished = subprocess.run(
        [sys.executable, "-m", "m1.cli", "status", "--root", str(tmp_path)], capture_output=True
    )
    assert finished.returncode == 1 and b"m1 up" in finished.stdout
