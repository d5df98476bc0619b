"""Runs stages and kills them with SIGKILL at given moments; `stage_kills.py JOB.json`.

Imports once, then forks a process for every attempt. A job has a `root` and `stages`, which it runs
one after the other, each with its `stage`, `sets` (overrides of the miniature recipe) and `kills`,
after which it runs to its end. A kill waits for one of

    {"phase": P, "step": N}   the stage is in phase P with N steps done
    {"steps": N}              the stage has logged N steps
    {"file": PATTERN}         something matches below the stage's folder
"""

import gc
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from m1.model import cpu

cpu.without_compilation()

import mlflow  # noqa: E402, F401
import reasoning_gym  # noqa: E402, F401
import torch  # noqa: E402

import m1.evaluate.register  # noqa: E402
import m1.evaluate.runner  # noqa: E402
import m1.train.rl  # noqa: E402, F401
from m1.config.loading import load_recipe  # noqa: E402
from m1.config.schema import Recipe  # noqa: E402
from m1.launch import run_stage  # noqa: E402
from m1.stage import stage_folder  # noqa: E402
from m1.tracking.events import read_events  # noqa: E402

RECIPE = Path(__file__).parents[1] / "recipes" / "mini.toml"


def work(stage: str, recipe: Recipe, events: str) -> None:
    os.environ["M1_EVENTS"] = events
    run_stage(stage, recipe)
    os._exit(0)  # gloo's threads may outlive an orderly end


class Moment:
    """When a kill is due; phases of earlier attempts do not count."""

    def __init__(self, kill: dict, folder: Path, events: Path) -> None:
        self.kill, self.folder, self.events = kill, folder, events
        _, self.offset = read_events(events)

    def is_due(self) -> bool:
        if "file" in self.kill:
            return any(self.folder.glob(self.kill["file"]))
        if "steps" in self.kill:
            metrics = self.folder / "metrics.jsonl"
            return metrics.exists() and metrics.read_text().count("\n") >= self.kill["steps"]
        found, self.offset = read_events(self.events, self.offset)
        wanted = self.kill["phase"], self.kill["step"]
        return any((e.get("phase"), e.get("step")) == wanted for e in found)


def attempt(root: Path, stage: str, sets: list[str], kill: dict | None) -> None:
    recipe = load_recipe([RECIPE], overrides=[f"storage.root={root}", *sets])
    events = root / "kills.jsonl"
    moment = Moment(kill, stage_folder(stage, recipe), events) if kill else None
    context = multiprocessing.get_context("fork")
    process = context.Process(target=work, args=(stage, recipe, str(events)))
    process.start()
    deadline = time.monotonic() + 300
    while moment is not None:
        if moment.is_due():
            os.kill(process.pid, signal.SIGKILL)
            break
        if not process.is_alive() or time.monotonic() > deadline:
            process.kill()
            sys.exit(f"{stage} never came to {kill}")
        time.sleep(0.002)
    process.join(300)
    if process.exitcode != (0 if kill is None else -signal.SIGKILL):
        sys.exit(f"{stage} ended with {process.exitcode}, kill {kill}")


def main(job: dict) -> None:
    torch.set_num_threads(1)
    gc.freeze()
    for stage in job["stages"]:
        for kill in [*stage["kills"], None]:
            attempt(Path(job["root"]), stage["stage"], stage["sets"], kill)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
