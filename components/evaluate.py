"""Score every checkpoint on the held-out tasks."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Model, Output


@dsl.component(base_image="python:3.11", install_kfp_package=False)  # type: ignore[untyped-decorator]
def evaluate(
    recipe: str,
    data: Input[Dataset],
    pretrain: Input[Model],
    output: Output[Artifact],
    sft: Input[Model] | None = None,
    rl: Input[Model] | None = None,
    sandbox: Input[Dataset] | None = None,
) -> None:
    """Score every checkpoint on the held-out tasks."""
    from m1.launch import run_component

    run_component(
        "evaluate",
        recipe,
        inputs={"data": data, "sandbox": sandbox, "pretrain": pretrain, "sft": sft, "rl": rl},
        output=output,
    )
