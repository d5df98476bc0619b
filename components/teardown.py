"""The run's exit handler: what it made in the cluster is deleted, however it ended."""

from kfp import dsl


@dsl.component(base_image="python:3.11", install_kfp_package=False)  # type: ignore[untyped-decorator]
def teardown(run_id: str) -> None:
    """Delete TrainJobs and inference servers of a run."""
    from m1.launch import tear_down_run

    tear_down_run(run_id)
