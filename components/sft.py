"""Supervised fine-tuning."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Markdown, Metrics, Model, Output


@dsl.component(base_image="python:3.11", install_kfp_package=False)  # type: ignore[untyped-decorator]
def sft(
    recipe: str,
    data: Input[Dataset],
    pretrain: Input[Model],
    output: Output[Model],
    metrics: Output[Metrics],
    report: Output[HTML],
    summary: Output[Markdown],
    run_id: str = "",
    run_name: str = "",
    priority: str = "",
) -> None:
    """Supervised fine-tuning."""
    from m1.launch import StageArtifacts, run_component
    from m1.launcher.job import RunLabels

    run_component(
        "sft",
        recipe,
        inputs={"data": data, "pretrain": pretrain},
        output=output,
        artifacts=StageArtifacts(metrics, report, summary),
        run=RunLabels(run_id, run_name, priority),
    )
