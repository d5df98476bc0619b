"""Build and validate environments for software engineering tasks."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Markdown, Metrics, Output


@dsl.component(base_image="python:3.11", install_kfp_package=False)  # type: ignore[untyped-decorator]
def sandbox(
    recipe: str,
    output: Output[Dataset],
    metrics: Output[Metrics],
    report: Output[HTML],
    summary: Output[Markdown],
) -> None:
    """Build and validate environments for software engineering tasks."""
    from m1.launch import StageArtifacts, run_component

    run_component(
        "sandbox",
        recipe,
        inputs={},
        output=output,
        artifacts=StageArtifacts(metrics, report, summary),
    )
