"""What both launchers share: the job's file, and what became of it.

The launcher writes what the ranks need to `ranks.json` in the stage's folder, which every rank must
reach under the same path; each enters through `m1.rank`. A mistake of the user's comes back in
`ranks.error` there.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from m1.config.loading import recipe_json
from m1.config.schema import Recipe
from m1.stage import finished, stage_folder
from m1.storage import atomic_write, disk_errors
from m1.types import M1Error, Pointer

JOB, FAILURE = "ranks.json", "ranks.error"


@dataclass(frozen=True)
class RunLabels:
    """The run that a stage belongs to, as a cluster shows it; all empty on one machine."""

    run_id: str = ""
    """KFP's id of the run."""
    run_name: str = ""
    """Name that a person gave it."""
    priority: str = ""
    """WorkloadPriorityClass of Kueue, for TrainJobs, and PriorityClass of Kubernetes, for inference
    servers; of one name."""


@dataclass(frozen=True)
class StageJob:
    """A stage to be run on several processes."""

    name: str
    recipe: Recipe
    inputs: Mapping[str, Pointer] | None
    """Pointers of earlier stages; None: found by their hashes."""
    num_processes: int

    @property
    def folder(self) -> Path:
        """The stage's folder."""
        return stage_folder(self.name, self.recipe)

    def prepare(self) -> None:
        """Leave what the ranks need in the folder."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / FAILURE).unlink(missing_ok=True)
        given = None if self.inputs is None else {s: asdict(p) for s, p in self.inputs.items()}
        job = {"stage": self.name, "recipe": json.loads(recipe_json(self.recipe)), "inputs": given}
        atomic_write(self.folder / JOB, json.dumps(job).encode())

    def outcome(self, failure: str) -> Pointer:
        """The finished stage's pointer.

        Args:
            failure: What to say where the ranks left no reason.

        Raises:
            M1Error: The stage is not finished.
        """
        pointer = finished(self.name, self.recipe)
        if pointer is not None:
            return pointer
        told = self.folder / FAILURE
        raise M1Error(told.read_text() if told.exists() else failure)


class Launcher(Protocol):
    """Starts the processes of a job and waits for them."""

    def run(self, job: StageJob) -> Pointer:
        """The stage's pointer.

        Raises:
            M1Error: What a rank met, or that one failed, with where its words are.
        """
