"""Score every checkpoint on the held-out tasks."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Markdown, Metrics, Model, Output


@dsl.component(base_image="python:3.11", install_kfp_package=False)  # type: ignore[untyped-decorator]
def evaluate(
    recipe: str,
    data: Input[Dataset],
    pretrain: Input[Model],
    output: Output[Artifact],
    metrics: Output[Metrics],
    report: Output[HTML],
    summary: Output[Markdown],
    sft: Input[Model] | None = None,
    rl: Input[Model] | None = None,
    sandbox: Input[Dataset] | None = None,
) -> None:
    """Score every checkpoint on the held-out tasks."""
    from m1.launch import StageArtifacts, run_component

    run_component(
        "evaluate",
        recipe,
        inputs={"data": data, "sandbox": sandbox, "pretrain": pretrain, "sft": sft, "rl": rl},
        output=output,
        artifacts=StageArtifacts(metrics, report, summary),
    )
