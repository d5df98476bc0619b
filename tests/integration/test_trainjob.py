"""The launcher's TrainJobs against an API with a controller that plays Kubeflow Trainer."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from published_schemas import FOLDERS, schema_of
from trainjob_cases import HANG, RUN, SERVERS, body_of, program

from m1.launcher import trainjob
from m1.launcher.cluster import ClusterError
from m1.launcher.job import RunLabels, StageJob
from m1.launcher.objects import RUN_LABEL
from m1.launcher.rollout import surroundings
from m1.launcher.teardown import tear_down
from m1.launcher.trainjob import Cancelled, TrainJobLauncher
from m1.types import M1Error

pytestmark = pytest.mark.skipif(
    schema_of("trainer.kubeflow.org/v1alpha1", "TrainJob") is None,
    reason=f"no published schema of a TrainJob in {FOLDERS} (M1_CRDS)",
)


@pytest.fixture
def make(launching):
    return launching


@pytest.mark.exhaustive  # a whole stage, twice
def test_a_stage_runs_in_the_pods_of_a_trainjob_and_its_words_come_back(make):
    # One node, as the pods here cannot meet under one name.
    api, launcher, job, _ = make(stage="data")
    job = StageJob("data", job.recipe, None, 1)
    pointer = launcher.run(job)
    assert pointer.stage == "data" and Path(pointer.uri).is_dir()
    assert not api.refused and api.made == [("trainjobs", f"m1-data-{pointer.stage_hash[:12]}")]
    assert launcher.run(job) == pointer  # complete, and made anew: the rank finds it done


def test_the_trainjob_asks_for_what_the_recipe_says(make, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc")
    monkeypatch.setenv("S3_KEY", "planted-secret")
    queue = ["resources.trainer.queue=gpus", "resources.pretrain.timeout_seconds=3600"]
    api, launcher, job, _ = make(sets=[*queue, "resources.trainer.start_seconds=0.3"])
    with pytest.raises(M1Error, match=r"no running pod after 0\.3 seconds"):
        launcher.run(job)
    assert not api.refused and not api.jobs()  # it waited in the queue, and was deleted
    identity = launcher._identity(job)
    asked = job.recipe.resources.of("pretrain")
    body = trainjob.objects.train_job(
        identity,
        asked,
        job.recipe.resources.trainer,
        image=job.recipe.image,
        folder="/work/x",
        num_processes=2,
    )
    assert "planted-secret" not in str(body)
    spec, labels = body["spec"], body["metadata"]["labels"]
    assert spec["suspend"] and labels["kueue.x-k8s.io/queue-name"] == "gpus"
    assert labels["kueue.x-k8s.io/priority-class"] == "high"
    assert labels["m1/run-name"] == "monday-s-run"
    assert spec["activeDeadlineSeconds"] == 3600
    trainer = spec["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 1)
    assert trainer["resourcesPerNode"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": "1"}
    variables = {e["name"]: e for e in trainer["env"]}
    assert variables["MLFLOW_RUN_ID"]["value"] == "abc"
    assert variables["S3_KEY"]["valueFrom"]["secretKeyRef"] == {"name": "s3", "key": "key"}
    patch = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]
    pod = patch["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"gpu": "h100"}
    assert [v["name"] for v in pod["volumes"]] == ["claim-work", "shm"]


def test_an_address_with_credentials_is_not_put_into_objects(make, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:planted-secret@mlflow.example.com")
    api, launcher, job, _ = make(HANG)
    with pytest.raises(M1Error, match="MLFLOW_TRACKING_PASSWORD") as refusal:
        launcher.run(job)
    assert "planted-secret" not in str(refusal.value) and not api.made


def test_a_pod_that_fails_is_a_failure_with_its_last_words(make):
    api, launcher, job, said = make(program("print('step 1'); raise SystemExit('out of memory')"))
    with pytest.raises(M1Error, match=r"(?s)JobsFailed.*out of memory") as failure:
        launcher.run(job)
    assert "pretrain" in str(failure.value)
    assert "step 1" in said  # streamed
    assert api.jobs()  # kept, to be looked at


def test_what_a_rank_says_of_a_users_mistake_is_the_message(make):
    _, launcher, job, _ = make(
        lambda started, pod: program(
            f"open({str(job.folder / 'ranks.error')!r}, 'w').write('/none holds no checkpoint'); "
            "raise SystemExit(1)"
        )(started, pod)
    )
    with pytest.raises(M1Error) as failure:
        launcher.run(job)
    assert str(failure.value) == "/none holds no checkpoint"


def test_a_job_of_a_failed_attempt_is_made_anew(make):
    api, launcher, job, said = make(program("raise SystemExit(1)"))
    for _ in range(2):
        with pytest.raises(M1Error, match="JobsFailed"):
            launcher.run(job)
    assert len(api.made) == 2 and len(api.deleted) == 1
    assert any("earlier attempt" in line for line in said)


def test_the_deadline_of_the_job_is_a_failure(make):
    _, launcher, job, _ = make(HANG, sets=["resources.pretrain.timeout_seconds=1"])
    with pytest.raises(M1Error, match="DeadlineExceeded"):
        launcher.run(job)


def test_a_job_that_nobody_ends_at_its_deadline_is_deleted_from_here(make, monkeypatch):
    monkeypatch.setattr(trainjob, "_GRACE_SECONDS", 0.3)
    api, launcher, job, _ = make(HANG, sets=["resources.pretrain.timeout_seconds=1"])
    api.ends_late = False
    with pytest.raises(M1Error, match="ran on after its 1 seconds"):
        launcher.run(job)
    assert not api.jobs()


def test_a_deleted_job_is_a_failure(make):
    api, launcher, job, _ = make(HANG)
    soon(lambda: api.pods, lambda: api.kept.clear())
    with pytest.raises(M1Error, match="deleted by someone else"):
        launcher.run(job)


def test_a_cancelled_run_deletes_its_job(make):
    api, launcher, job, said = make(HANG)
    soon(lambda: "working" in said and is_caught(), end_this_pod)
    with pytest.raises(Cancelled):
        launcher.run(job)
    assert not api.jobs()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_cancelled_run_leaves_the_job_of_another_that_it_followed(make):
    api, launcher, job, _ = make(HANG)
    launcher._ensure(body_of(launcher, job), job)
    follower = TrainJobLauncher(launcher._cluster, run=RunLabels("run-2"), say=lambda _: None)
    soon(lambda: api.pods and is_caught(), end_this_pod)
    with pytest.raises(Cancelled):
        follower.run(job)
    assert len(api.jobs()) == 1


def test_a_component_that_starts_again_follows_the_job_it_had_made(make):
    api, launcher, job, said = make(program("import time; time.sleep(1); raise SystemExit('end')"))
    launcher._ensure(body_of(launcher, job), job)  # and the component dies here
    with pytest.raises(M1Error, match="JobsFailed"):
        launcher.run(job)
    assert len(api.made) == 1 and any("under way" in line for line in said)


def test_a_job_of_another_content_under_the_name_is_not_touched(make):
    api, launcher, job, _ = make(HANG)
    body = body_of(launcher, job)
    launcher._ensure(body, job)
    api.jobs()[0]["metadata"]["annotations"]["m1/stage-hash"] = "other"
    with pytest.raises(M1Error, match="was not made for this stage"):
        launcher.run(job)
    assert len(api.jobs()) == 1


def test_an_api_server_that_stumbles_is_asked_again(make):
    api, launcher, job, _ = make(program("raise SystemExit('end')"))
    api.trouble = [503, 500, 429]
    with pytest.raises(M1Error, match="JobsFailed"):
        launcher.run(job)
    assert len(api.made) == 1


def test_an_api_server_that_stays_away_leaves_the_job_running(make):
    api, launcher, job, _ = make(HANG, retry_seconds=0.5)
    soon(lambda: api.pods, lambda: api.trouble.extend([503] * 1000))
    with pytest.raises(ClusterError):
        launcher.run(job)
    assert api.jobs() and {pod["phase"] for pod in api.pods.values()} == {"Running"}


def test_a_field_that_trainer_does_not_know_is_refused(make):
    api, launcher, job, _ = make(HANG)
    body = body_of(launcher, job)
    body["spec"]["trainer"]["numGpus"] = 8
    with pytest.raises(ClusterError, match="numGpus"):
        launcher._ensure(body, job)
    assert api.refused and not api.jobs()


def test_inference_servers_stand_around_the_rl_stage_and_are_taken_down(make):
    api, launcher, job, _ = make(HANG, sets=SERVERS)
    cluster = launcher._cluster
    with (
        pytest.raises(ZeroDivisionError),
        surroundings("rl", job.recipe, cluster, run=RUN, say=lambda _: None) as address,
    ):
        assert {kind for kind, _ in api.kept} == {
            "deployments",
            "services",
            "horizontalpodautoscalers",
        }
        name = next(name for kind, name in api.kept if kind == "services")
        assert address == f"dns+http://{name}.team.svc:8000"
        scaler = api.kept["horizontalpodautoscalers", name]["spec"]
        assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 4)
        assert scaler["metrics"][0]["pods"]["metric"]["name"] == "m1_pending_completions"
        raise ZeroDivisionError  # whatever happens to the stage
    assert not api.kept


def test_servers_that_do_not_become_ready_end_the_stage_and_are_taken_down(make):
    api, launcher, job, _ = make(HANG, sets=[*SERVERS, "resources.rollout.start_seconds=0.2"])
    api.are_servers_ready = False
    around = surroundings("rl", job.recipe, launcher._cluster, run=RUN, say=lambda _: None)
    with pytest.raises(M1Error, match="0 of 2 inference servers"), around:
        pass
    assert not api.kept


def test_the_exit_handler_deletes_what_a_killed_component_left_and_nothing_else(make):
    api, launcher, job, _ = make(HANG, sets=SERVERS)
    launcher._ensure(body_of(launcher, job), job)
    around = surroundings("rl", job.recipe, launcher._cluster, run=RUN, say=lambda _: None)
    around.__enter__()  # and the component is killed
    other = body_of(launcher, job)
    other["metadata"]["name"], other["metadata"]["labels"][RUN_LABEL] = "other", "run-2"
    api.kept["trainjobs", "other"] = other
    deleted = tear_down(launcher._cluster, "run-1")
    assert len(deleted) == 4 and list(api.kept) == [("trainjobs", "other")]
    assert tear_down(launcher._cluster, "run-1") == () == tear_down(launcher._cluster, "")


def is_caught():
    return signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


def end_this_pod():
    if is_caught():  # else it would end the tests
        os.kill(os.getpid(), signal.SIGTERM)


def soon(condition, act):
    """Act from a thread when a condition holds."""

    def wait():
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        act()

    threading.Thread(target=wait, daemon=True).start()
