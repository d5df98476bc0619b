"""What a person asked for in the UI, checked and handed to the stages."""

from typing import NamedTuple

from kfp import dsl
from kfp.dsl import Markdown, Output


@dsl.component(base_image="python:3.11", install_kfp_package=False)  # type: ignore[untyped-decorator]
def resolve(
    recipe: str,
    overrides: str,
    fixed: str,
    summary: Output[Markdown],
    checkpoint: str = "",
) -> NamedTuple(  # type: ignore[valid-type]
    "Stages",
    [
        ("data", str),
        ("sandbox", str),
        ("pretrain", str),
        ("sft", str),
        ("rl", str),
        ("evaluate", str),
        ("register", str),
    ],
):
    """Apply overrides to the recipe, and give each stage the part that it depends on."""
    from m1.resolving import resolve_component

    return resolve_component(recipe, overrides, fixed=fixed, checkpoint=checkpoint, summary=summary)
