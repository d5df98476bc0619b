"""Export the final model and register it."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Markdown, Metrics, Model, Output


@dsl.component(base_image="python:3.11", install_kfp_package=False)  # type: ignore[untyped-decorator]
def register(
    recipe: str,
    data: Input[Dataset],
    pretrain: Input[Model],
    output: Output[Model],
    metrics: Output[Metrics],
    report: Output[HTML],
    summary: Output[Markdown],
    sft: Input[Model] | None = None,
    rl: Input[Model] | None = None,
) -> None:
    """Export the final model and register it."""
    from m1.launch import StageArtifacts, run_component

    run_component(
        "register",
        recipe,
        inputs={"data": data, "pretrain": pretrain, "sft": sft, "rl": rl},
        output=output,
        artifacts=StageArtifacts(metrics, report, summary),
    )
