"""Continual pretraining."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output


@dsl.component(base_image="python:3.11", install_kfp_package=False)  # type: ignore[untyped-decorator]
def pretrain(
    recipe: str,
    data: Input[Dataset],
    output: Output[Model],
) -> None:
    """Continual pretraining."""
    from m1.launch import run_component

    run_component("pretrain", recipe, inputs={"data": data}, output=output)
