"""Tasks fit for RL."""

from kfp import dsl
from kfp.dsl import Dataset, Output


@dsl.component(base_image="python:3.11", install_kfp_package=False)  # type: ignore[untyped-decorator]
def curate(
    settings: str,
    tasks: Output[Dataset],
) -> None:
    """Filter, deduplicate and decontaminate tasks; `settings` is JSON, see `m1 curate`."""
    from m1.curate.files import curate_artifact

    curate_artifact(settings, tasks)
