"""Runs the rl stage and kills it with SIGKILL in given phases; `rl_kills.py JOB.json`.

Imports once, then forks a process for every attempt. A job has a `root` and `stages`, which it runs
one after the other, each with `sets` (overrides of the miniature recipe) and `kills` ([phase, steps
done] each), after which it runs to its end.
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

import m1.train.rl  # noqa: E402, F401
from m1.config.loading import load_recipe  # noqa: E402
from m1.launch import run_stage  # noqa: E402
from m1.tracking.events import read_events  # noqa: E402

RECIPE = Path(__file__).parents[1] / "recipes" / "mini.toml"


def work(root: str, sets: list[str], events: str) -> None:
    os.environ["M1_EVENTS"] = events
    recipe = load_recipe([RECIPE], overrides=[f"storage.root={root}", *sets])
    run_stage("rl", recipe)
    os._exit(0)  # gloo's threads may outlive an orderly end


def attempt(root: str, sets: list[str], kill: tuple[str, int] | None) -> None:
    context = multiprocessing.get_context("fork")
    events = Path(root) / "rl-kills.jsonl"
    _, offset = read_events(events)
    process = context.Process(target=work, args=(root, sets, str(events)))
    process.start()
    deadline = time.monotonic() + 300
    while kill is not None:
        found, offset = read_events(events, offset)
        if any((e.get("phase"), e.get("step")) == kill for e in found):
            os.kill(process.pid, signal.SIGKILL)
            break
        if not process.is_alive() or time.monotonic() > deadline:
            process.kill()
            sys.exit(f"the stage was not in phase {kill[0]} after {kill[1]} steps")
        time.sleep(0.002)
    process.join(300)
    if kill is None and process.exitcode != 0:
        sys.exit(f"the stage ended with {process.exitcode}")


def main(job: dict) -> None:
    torch.set_num_threads(1)
    gc.freeze()
    for stage in job["stages"]:
        for kill in [*map(tuple, stage["kills"]), None]:
            attempt(job["root"], stage["sets"], kill)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
