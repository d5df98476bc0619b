"""Supervised fine-tuning."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output


@dsl.component(base_image="python:3.11", install_kfp_package=False)  # type: ignore[untyped-decorator]
def sft(
    recipe: str,
    data: Input[Dataset],
    pretrain: Input[Model],
    output: Output[Model],
) -> None:
    """Supervised fine-tuning."""
    from m1.launch import run_component

    run_component("sft", recipe, inputs={"data": data, "pretrain": pretrain}, output=output)
