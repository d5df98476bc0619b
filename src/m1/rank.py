"""One rank of a stage: `python -m m1.rank FOLDER`, started by `m1.launcher`."""

import json
import os
import sys
from functools import partial
from pathlib import Path

from m1.config.schema import Recipe
from m1.launch import run_body
from m1.launcher.job import FAILURE, JOB
from m1.stage import assist, execute
from m1.storage import atomic_write
from m1.types import M1Error, Pointer


def main(folder: Path) -> None:
    """Do this rank's part of the job in a stage's folder; a mistake of the user's is left there."""
    job = json.loads((folder / JOB).read_text())
    recipe = Recipe.model_validate(job["recipe"])
    given = job["inputs"]
    inputs = None if given is None else {stage: Pointer(**p) for stage, p in given.items()}
    body = partial(run_body, job["stage"])
    try:
        if os.environ["RANK"] == "0":
            execute(job["stage"], recipe, body, inputs=inputs)
        else:
            assist(job["stage"], recipe, body, inputs=inputs)
    except M1Error as error:
        atomic_write(folder / FAILURE, str(error).encode())
        raise
    _leave()


def _leave() -> None:
    """End in step with the other ranks."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
