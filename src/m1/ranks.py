"""A stage of several processes on this machine, started by torchrun.

The launching process writes what the ranks need to `ranks.json` in the stage's folder and waits;
every rank enters through `m1.rank`. What they print is in `ranks.log` there. One rank that fails
ends the others, and all of them end with the launcher, even by SIGKILL.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from m1.config.loading import recipe_json
from m1.config.schema import Recipe
from m1.config.stages import image_digest
from m1.stage import exit_with_launcher, finished, stage_folder
from m1.storage import atomic_write, disk_errors
from m1.types import M1Error, Pointer

JOB, LOG, FAILURE = "ranks.json", "ranks.log", "ranks.error"


def run(
    name: str, recipe: Recipe, *, inputs: Mapping[str, Pointer] | None, num_processes: int
) -> Pointer:
    """Run a stage on `num_processes` ranks of this machine.

    Raises:
        M1Error: What a rank met, or that one failed, with where its words are.
    """
    exit_with_launcher()
    folder = stage_folder(name, recipe)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FAILURE).unlink(missing_ok=True)
    given = None if inputs is None else {stage: asdict(p) for stage, p in inputs.items()}
    job = {"stage": name, "recipe": json.loads(recipe_json(recipe)), "inputs": given}
    atomic_write(folder / JOB, json.dumps(job).encode())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={num_processes}", "-m", "m1.rank", str(folder)]
    environment = {
        **os.environ,
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # megatron's overlap of collectives asks for it
        "M1_IMAGE_DIGEST": image_digest(),
        "M1_LAUNCHER_PID": str(os.getpid()),
    }
    with (folder / LOG).open("wb") as log:
        ended = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
        )
    pointer = finished(name, recipe)
    if pointer is None:
        raise M1Error(_failure(name, folder, ended.returncode, num_processes))
    return pointer


def _failure(name: str, folder: Path, status: int, num_processes: int) -> str:
    told = folder / FAILURE
    if told.exists():
        return told.read_text()
    return (
        f"stage {name} failed on one of its {num_processes} processes (torchrun ended with status "
        f"{status}); its words are in {folder / LOG}. Run the same command to go on"
    )
