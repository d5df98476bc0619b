"""Rewards for a file of completions."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Output


@dsl.component(base_image="python:3.11", install_kfp_package=False)  # type: ignore[untyped-decorator]
def grade(
    completions: Input[Dataset],
    graded: Output[Dataset],
    format_weight: float = 0.0,
) -> None:
    """Rewards for a JSONL file of completions; see `m1 grade`."""
    from m1.rewards.grade import grade_artifact

    grade_artifact(completions, graded, format_weight=format_weight)
