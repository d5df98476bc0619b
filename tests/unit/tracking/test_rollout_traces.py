import os

import mlflow

from m1.tracking.opening import open_stage_run
from m1.tracking.rollout_traces import RolloutTrace
from m1.tracking.store import open_client


def trace(number):
    return RolloutTrace(
        task_id=f"sum-{number}",
        source="sums",
        prompt="What is 2 + 2?",
        text="It is 4.",
        finish_reason="stop",
        reward=1.1,
        accuracy=1.0,
        parts={"format": 0.1},
        num_tokens=5,
        first_policy_version=3,
        last_policy_version=4,
    )


def test_rollouts_are_traces_of_the_run_once_however_often_a_step_is_repeated(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    before = mlflow.get_tracking_uri()
    run = open_stage_run(uri=uri, experiment="m1", stage="rl", stage_hash="a" * 64)
    run.log_rollouts([trace(1)], step=10)
    run.log_rollouts([trace(1), trace(2)], step=10)  # the first attempt was killed between the two
    run.log_rollouts([trace(1), trace(2)], step=10)
    run.log_rollouts([trace(3)], step=20)
    run.close()
    assert mlflow.get_tracking_uri() == before
    assert "MLFLOW_TRACKING_URI" not in os.environ
    found = open_client(uri).search_traces(locations=[run.experiment_id], run_id=run.run_id)
    tasks = sorted((t.info.tags["m1.step"], t.info.tags["m1.task_id"]) for t in found)
    assert tasks == [("10", "sum-1"), ("10", "sum-2"), ("20", "sum-3")]
    (span,) = found[0].data.spans
    assert span.inputs == {"prompt": "What is 2 + 2?"}
    assert span.outputs["completion"] == "It is 4."
    assert (span.outputs["reward"], span.outputs["reward.format"]) == (1.1, 0.1)
