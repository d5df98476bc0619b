"""`m1 submit`, `runs`, `logs` and `cancel` against the published endpoints of KFP."""

import re
import socket
import threading

import pytest
import yaml
from kfp_api import SWAGGER, KfpApi
from kubernetes import client
from typer.testing import CliRunner

from m1.cli import app
from m1.pipeline import load_pipelines
from m1.types import M1Error

RECIPE = "tests/recipes/mini.toml"
pytestmark = pytest.mark.skipif(
    not SWAGGER.exists(), reason=f"no published swagger at {SWAGGER} (M1_KFP_SWAGGER)"
)


@pytest.fixture
def api(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # KFP's client keeps a context there
    monkeypatch.setenv("COLUMNS", "200")
    served = KfpApi()
    monkeypatch.setenv("M1_KFP_HOST", served.url)
    monkeypatch.setenv("M1_KFP_TOKEN", served.token)
    yield served
    served.close()


def call(*arguments, retry=2.0):
    done = CliRunner().invoke(app, [*arguments, f"--retry-seconds={retry}"])
    if isinstance(done.exception, M1Error):
        return done.exception, done.output
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return None, done.output


def submit(*arguments, part="--only=data", **options):  # small parts compile fast
    return call("submit", RECIPE, *arguments, *([part] if part else []), **options)


def test_a_version_is_uploaded_once_and_run_each_time(api):
    _, first = submit("--name=monday", "--priority=high")
    _, second = submit()
    assert len(api.operations("CreatePipeline")) == len(api.operations("UploadPipeline")) == 1
    assert "uploaded" in first and "on the server already" in second
    one, two = api.runs.values()
    assert one["display_name"] == "monday"
    assert one["runtime_config"]["parameters"] == {"run_name": "monday", "priority": "high"}
    (version,) = api.versions.values()
    assert two["display_name"] == version["name"] and re.search(
        r"m1-mini-data-[0-9a-f]{12}", second
    )
    assert f"{api.url}/#/runs/details/{two['run_id']}" in second
    assert "MLflow" in second


def test_a_changed_recipe_is_another_version_of_the_same_pipeline(api):
    submit()
    submit("--set=data.sequence_length=128")
    assert len(api.pipelines) == 1 and len(api.versions) == 2


def test_once_starts_no_second_run_but_does_after_a_failure(api):
    submit("--once")
    _, again = submit("--once")
    assert len(api.runs) == 1 and "of before" in again
    next(iter(api.runs.values()))["state"] = "FAILED"
    submit("--once")
    assert len(api.runs) == 2


def test_waiting_follows_to_the_end_and_shows_every_stage(api):
    _, output = submit("--wait", "--poll-seconds=0.01", part="")
    assert "SUCCEEDED" in output and "root-driver" not in output
    for stage in ("data", "pretrain", "sft", "rl", "evaluate", "register"):
        assert re.search(rf"^\s*{stage}\s+SUCCEEDED", output, re.MULTILINE), output


@pytest.mark.parametrize("end", ["FAILED", "CANCELED"])
def test_waiting_for_a_run_that_does_not_succeed_fails(api, end):
    api.end = end
    error, _ = submit("--wait", "--poll-seconds=0.01")
    assert f"ended {end}" in str(error)
    assert ("data: the disk is full" in str(error)) == (end == "FAILED")


def test_a_run_is_listed_and_cancelled_by_name(api):
    submit("--name=monday")
    _, listed = call("runs")
    (run,) = api.runs.values()
    assert "monday" in listed and run["run_id"] in listed
    _, output = call("cancel", "monday")
    assert run["run_id"] in output and run["state"] == "CANCELING"
    error, _ = call("cancel", "tuesday")
    assert "no run 'tuesday'" in str(error)


class Pods:
    """What `m1 logs` asks of Kubernetes: pods by label, and their logs."""

    def __init__(self, *pods):
        self.pods = [client.V1Pod(**pod) for pod in pods]

    def list_namespaced_pod(self, namespace, *, label_selector):
        wanted = dict(pair.split("=") for pair in label_selector.split(","))
        found = [p for p in self.pods if wanted.items() <= p.metadata.labels.items()]
        return client.V1PodList(items=found)

    def read_namespaced_pod_log(self, name, namespace, *, container):
        return f"words of {name}/{container}\n"


def pod(name, container="main", node="", **labels):
    notes = {"workflows.argoproj.io/node-name": node} if node else {}
    return {
        "metadata": client.V1ObjectMeta(
            name=name,
            annotations=notes,
            labels={key.replace("_", "/"): value for key, value in labels.items()},
        ),
        "spec": client.V1PodSpec(containers=[client.V1Container(name=container)]),
    }


def test_logs_are_the_components_and_those_of_the_job_it_made(api):
    submit()
    (run_id,) = api.runs
    follow = load_pipelines("follow")
    server = load_pipelines("server").KfpServer(load_pipelines("server").connection())
    assert follow.task_of(server, run_id, "data") == "data"
    with pytest.raises(M1Error, match="no stage 'rl'; it has: data, resolve"):
        follow.task_of(server, run_id, "rl")
    run = {"pipeline_runid": run_id}
    core = Pods(
        pod("driver", node="m1-x.root.data.driver", **run),
        pod("one", node="m1-x.root.data.executor", **run),
        pod("other", node="m1-x.root.metadata.executor", **run),
        pod("rank", "node", m1_run=run_id, m1_stage="data"),
        pod("strange", node="m1-x.root.data.executor", pipeline_runid="another"),
    )
    lines = list(follow.stage_logs(core, "kubeflow", run_id, task="data", stage="data"))
    assert lines == ["== one", "words of one/main", "== rank", "words of rank/node"]
    with pytest.raises(M1Error, match="has no pod of sft"):
        list(follow.stage_logs(core, "kubeflow", run_id, task="sft", stage="sft"))


def test_logs_are_found_inside_the_exit_handler_and_of_every_attempt():
    # Names of nodes as KFP's compiler (argocompiler) and Argo's controller put them together.
    follow, run = load_pipelines("follow"), {"pipeline_runid": "r"}
    core = Pods(
        pod("impl-1", node="m1-x7k2p.root.exit-handler-1.rl.executor(0)", **run),
        pod("impl-2", node="m1-x7k2p.root.exit-handler-1.rl.executor(1)", **run),
        pod("driver", node="m1-x7k2p.root.exit-handler-1.rl-driver", **run),
        pod("longer", node="m1-x7k2p.root.exit-handler-1.rl-2.executor(0)", **run),
        pod("teardown", node="m1-x7k2p.root.exit-handler-1.onExit.teardown.executor", **run),
    )
    lines = list(follow.stage_logs(core, "kubeflow", "r", task="rl", stage="rl"))
    assert [line for line in lines if line.startswith("==")] == ["== impl-1", "== impl-2"]
    lines = list(follow.stage_logs(core, "kubeflow", "r", task="rl-2", stage="rl_80000"))
    assert lines[0] == "== longer"


def test_an_expired_token_is_named_without_being_shown(api, monkeypatch):
    monkeypatch.setenv("M1_KFP_TOKEN", "planted-secret")
    error, output = submit()
    assert "expired" in str(error) and "M1_KFP_TOKEN" in str(error)
    assert "planted-secret" not in str(error) + output
    assert len(api.calls) == 1  # asking again would not help


def test_a_token_that_is_renewed_in_its_file_is_taken_up(api, tmp_path):
    file = tmp_path / "token"
    file.write_text("token-0")
    threading.Timer(0.3, file.write_text, ["token-1\n"]).start()
    error, _ = submit(f"--token-file={file}", retry=20.0)
    assert error is None and len(api.runs) == 1


def test_cookies_of_a_login_page_are_sent(api, tmp_path, monkeypatch):
    monkeypatch.delenv("M1_KFP_TOKEN")
    api.cookie = "authservice_session=abc"
    file = tmp_path / "cookies"
    file.write_text("authservice_session=abc\n")
    error, _ = submit(f"--cookies-file={file}")
    assert error is None and len(api.runs) == 1


def test_a_server_that_is_down_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{free.getsockname()[1]}"
    error, _ = call("runs", f"--host={host}", retry=0.5)
    assert host in str(error) and "does not answer" in str(error)


def test_passing_trouble_is_waited_out(api):
    api.trouble = [(503, {"message": "starting"}), (429, {"message": "slow down"})]
    error, _ = submit(retry=20.0)
    assert error is None and len(api.runs) == 1


def test_a_quota_error_says_what_the_server_said(api):
    refusal = (429, {"code": 8, "message": "quota of runs exceeded: 3 of 3"})
    api.trouble = [refusal] * 1000
    error, _ = submit(retry=0.5)
    assert "quota of runs exceeded: 3 of 3" in str(error) and not api.runs


def test_a_run_is_not_started_twice_when_the_server_fails_over_it(api):
    submit()
    original = api.create_run

    def lose_the_answer(body):
        original(body)
        return 500, {"code": 13, "message": "lost"}

    api.create_run = lose_the_answer
    error, _ = submit(retry=3.0)
    assert "lost" in str(error)
    assert len(api.operations("CreateRun")) == 2 and len(api.runs) == 2


def test_two_submits_at_once_share_a_version(api):
    original = api.list_versions
    answers = [{"pipeline_versions": []}]
    submit()
    api.list_versions = lambda *given: answers.pop() if answers else original(*given)
    error, _ = submit()  # it does not see the version, and is refused the upload
    assert error is None and len(api.versions) == 1 and len(api.runs) == 2


def test_rl_only_needs_a_checkpoint_and_hands_it_on(api):
    error, _ = submit(part="--only=rl")
    assert "checkpoint" in str(error)
    submit("--checkpoint=s3://m1/base", part="--only=rl")
    (run,) = api.runs.values()
    assert run["runtime_config"]["parameters"] == {"checkpoint": "s3://m1/base"}
    assert next(iter(api.pipelines.values()))["name"] == "m1-mini-rl"


def test_no_secret_of_the_environment_is_uploaded(api, monkeypatch, tmp_path):
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "M1_SERVE_TOKEN"):
        monkeypatch.setenv(name, "planted-secret")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:planted-secret@mlflow.example.com")
    _, output = submit()
    assert "https://mlflow.example.com" in output
    assert "planted-secret" not in output + yaml.safe_dump([api.versions, api.runs])
    assert api.token not in yaml.safe_dump([api.versions, api.runs])


def test_a_submission_without_a_server_says_what_to_set(monkeypatch):
    monkeypatch.delenv("M1_KFP_HOST", raising=False)
    error, _ = call("runs")
    assert "M1_KFP_HOST" in str(error)


def test_the_recipe_is_checked_before_anything_is_asked(api):
    error, _ = submit("--set=rl.group_size=1")
    assert "rl.group_size" in str(error) and not api.calls


def test_the_swagger_refuses_what_kfp_does_not_know(api):
    api.check({"display_name": "x", "colour": 1}, {"$ref": "#/definitions/v2beta1Run"}, "here")
    assert "colour" in api.violations.pop()
