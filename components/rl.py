"""Reinforcement learning with CISPO."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Markdown, Metrics, Model, Output


@dsl.component(base_image="python:3.11", install_kfp_package=False)  # type: ignore[untyped-decorator]
def rl(
    recipe: str,
    data: Input[Dataset],
    pretrain: Input[Model],
    output: Output[Model],
    metrics: Output[Metrics],
    report: Output[HTML],
    summary: Output[Markdown],
    sft: Input[Model] | None = None,
    sandbox: Input[Dataset] | None = None,
    previous: Input[Model] | None = None,
    stage: str = "rl",
    run_id: str = "",
    run_name: str = "",
    priority: str = "",
) -> None:
    """Reinforcement learning with CISPO."""
    from m1.launch import StageArtifacts, run_component
    from m1.launcher.job import RunLabels

    run_component(
        stage,
        recipe,
        inputs={
            "data": data,
            "sandbox": sandbox,
            "pretrain": pretrain,
            "sft": sft,
            "rl": previous,
        },
        output=output,
        artifacts=StageArtifacts(metrics, report, summary),
        run=RunLabels(run_id, run_name, priority),
    )
