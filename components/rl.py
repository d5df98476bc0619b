"""Reinforcement learning with CISPO."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output


@dsl.component(base_image="python:3.11", install_kfp_package=False)  # type: ignore[untyped-decorator]
def rl(
    recipe: str,
    data: Input[Dataset],
    pretrain: Input[Model],
    output: Output[Model],
    sft: Input[Model] | None = None,
    sandbox: Input[Dataset] | None = None,
    previous: Input[Model] | None = None,
    stage: str = "rl",
) -> None:
    """Reinforcement learning with CISPO."""
    from m1.launch import run_component

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
    )
