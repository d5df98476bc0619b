"""Where a run's artifacts and lineage go: this machine's files, its services, or a cluster."""

import contextlib
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

from m1.config.schema import Recipe
from m1.services import BUCKET, Services, environment_of
from m1.types import M1Error


class Profile(StrEnum):
    """Where a run happens and keeps things."""

    LAPTOP = "laptop"
    """Files on this machine."""
    ONE_MACHINE = "one-machine"
    """The S3 and MLflow servers of `m1 up`."""
    CLUSTER = "cluster"
    """Kubernetes."""


@contextlib.contextmanager
def use_profile(profile: Profile, recipe: Recipe) -> Iterator[Recipe]:
    """Set this process up for a profile during the block.

    Yields:
        The recipe with its storage where the profile keeps it: a local root becomes the scratch
        folder beside `s3://m1-store/runs`, an S3 root stays. No stage hash changes.

    Raises:
        M1Error: The services do not run, or the profile is for another command.
    """
    if profile is Profile.LAPTOP:
        yield recipe
        return
    if profile is Profile.CLUSTER:
        raise M1Error(
            "profile cluster runs on Kubernetes, so this command cannot; submit the recipe with "
            "`m1 submit RECIPE`"
        )
    is_remote = recipe.storage.root.startswith("s3://")
    local = recipe.storage.scratch if is_remote else recipe.storage.root
    services = Services(Path(local))
    _require_answering(services)
    root = recipe.storage.root if is_remote else f"s3://{BUCKET}/runs"
    storage = recipe.storage.model_copy(update={"root": root, "scratch": local})
    with environment_of(services):
        yield recipe.model_copy(update={"storage": storage})


def _require_answering(services: Services) -> None:
    states = {state.name: state for state in services.status()}
    down = [
        name for name in ("s3", "mlflow") if name not in states or not states[name].is_answering
    ]
    if down:
        raise M1Error(
            f"profile one-machine needs {' and '.join(down)} of {services.folder}, which do not "
            f"answer; start them with `m1 up --root {services.folder.parent}`"
        )
