"""CISPO, DAPO and GRPO from one SFT model (the controlled comparison of the paper's Fig. 2).

    python -m benchmarks.cispo_vs_dapo_vs_grpo --root FOLDER --json OUT [--seeds 1 2 3 4 5]
                                               [--jobs 1] [--plot PNG]

All arms share the SFT checkpoint of `laptop.toml`, its tasks, dynamic sampling, group-relative
advantages, the token mean over the batch, 16 updates a generation batch and a constant learning
rate. Only the objective differs (`rl.loss.name`), and the learning rate, which is swept for each
arm on a seed of its own. Equal seeds draw the same tasks and first completions in every arm.

The measure is accuracy of all completions sampled in a step, before dynamic sampling; the 1,200 RL
tasks come again after about 19 steps. Steps to the threshold: the first step at which the mean over
`WINDOW` steps reaches it; a run that never does counts as one step more than it had, which makes a
slow arm look faster than it is. Intervals are Student's over seeds, 95%.

A finished arm is kept in FOLDER and not repeated; one that was killed goes on. `--jobs` runs that
many at a time, each with the threads that OMP_NUM_THREADS gives.
"""

import argparse
import json
import math
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.machine import write
from m1.config.loading import load_recipe
from m1.config.schema import Recipe
from m1.launch import run_stage
from m1.stage import METRICS, read_metrics, stage_folder
from m1.storage import atomic_write

RECIPE = Path(__file__).parents[1] / "pipelines/recipes/laptop.toml"
ARMS = ("cispo", "dapo", "grpo")
BASE = ("data", "pretrain", "sft")
WINDOW = 3
_REPORTING = threading.Lock()
METRICS_SHOWN = (
    "accuracy",
    "clip_fraction",
    "entropy_nats",
    "gradient_share_rare",
    "completion_length_tokens",
    "importance_ratio",
    "groups_kept",
)


@dataclass(frozen=True)
class Run:
    """One arm at one learning rate from one seed."""

    arm: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.arm}-{self.lr:g}-{self.seed}"


def base_recipe(root: Path) -> Recipe:
    """The recipe whose SFT model all arms start from."""
    return load_recipe([RECIPE], overrides=[f"storage.root={root}"])


def arm_recipe(run: Run, root: Path, num_steps: int) -> Recipe:
    """The recipe of a run; its seed is that of sampling, its inputs are the base's."""
    overrides = {
        "storage.root": root,
        "seed": run.seed,
        "rl.num_steps": num_steps,
        "rl.updates_per_step": 16,
        "rl.loss.name": run.arm,
        "rl.loss.aggregation": "token_mean",
        "rl.optimizer.lr": run.lr,
        "rl.schedule.decay_fraction": 0.0,
        "rl.checkpoint_every_steps": 5,
        "rl.traces.every_steps": 0,
        "rl.traces.mlflow_every_steps": 0,
    }
    return load_recipe([RECIPE], overrides=[f"{k}={v}" for k, v in overrides.items()])


def make_base(root: Path) -> None:
    """Data, pretraining and SFT, once."""
    for stage in BASE:
        run_stage(stage, base_recipe(root))


def make_run(run: Run, root: Path, num_steps: int) -> None:
    """Train one arm and keep its curves."""
    recipe = arm_recipe(run, root, num_steps)
    inputs = {stage: run_stage(stage, base_recipe(root)) for stage in BASE}
    run_stage("rl", recipe, inputs=inputs)
    rows = read_metrics(stage_folder("rl", recipe) / METRICS)
    found = {"arm": run.arm, "lr": run.lr, "seed": run.seed, "curves": curves(rows)}
    path = curve_path(run, root, num_steps)
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, (json.dumps(found) + "\n").encode())  # another job may be reading


def curves(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Metrics by step."""
    return {
        name: [row["metrics"][f"rl/{name}"] for row in rows]
        for name in METRICS_SHOWN
        if all(f"rl/{name}" in row["metrics"] for row in rows)
    }


def curve_path(run: Run, root: Path, num_steps: int) -> Path:
    """Where a finished run's curves are."""
    return root / "arms" / f"{run.name}-{num_steps}.json"


def steps_to(accuracy: Sequence[float], threshold: float) -> int | None:
    """First step (from 1) at which the mean over the last `WINDOW` steps reaches the threshold."""
    for step in range(WINDOW, len(accuracy) + 1):
        if np.mean(accuracy[step - WINDOW : step]) >= threshold:
            return step
    return None


def bounded_steps(found: dict[str, Any], threshold: float) -> int:
    """The same; one more than there were where it is never reached."""
    accuracy = found["curves"]["accuracy"]
    return steps_to(accuracy, threshold) or len(accuracy) + 1


def best_rate(sweep: Sequence[dict[str, Any]], threshold: float) -> float:
    """Fewest steps to the threshold; among equals the highest mean accuracy over all steps."""

    def rank(found: dict[str, Any]) -> tuple[int, float]:
        return bounded_steps(found, threshold), -float(np.mean(found["curves"]["accuracy"]))

    return float(min(sweep, key=rank)["lr"])


def summarize(runs: Sequence[dict[str, Any]], threshold: float) -> dict[str, Any]:
    """One arm's means over seeds, with 95% intervals."""
    reached = [steps_to(r["curves"]["accuracy"], threshold) is not None for r in runs]
    summary: dict[str, Any] = {
        "lr": runs[0]["lr"],
        "seeds": [r["seed"] for r in runs],
        "reached": sum(reached),
        "steps_to_threshold": interval([bounded_steps(r, threshold) for r in runs]),
        "accuracy_over_all_steps": interval([np.mean(r["curves"]["accuracy"]) for r in runs]),
        "accuracy_at_the_end": interval([np.mean(r["curves"]["accuracy"][-5:]) for r in runs]),
    }
    for name in ("clip_fraction", "entropy_nats", "gradient_share_rare"):
        if all(name in r["curves"] for r in runs):
            summary[name] = interval([np.mean(r["curves"][name]) for r in runs])
    return summary


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean over seeds with Student's 95% interval."""
    data = np.asarray(values, dtype=np.float64)
    mean, spread = float(data.mean()), float(data.std(ddof=1)) if len(data) > 1 else math.nan
    half = float(stats.t.ppf(0.975, max(1, len(data) - 1))) * spread / math.sqrt(len(data))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def differences(runs: dict[str, list[dict[str, Any]]], threshold: float) -> dict[str, Any]:
    """CISPO minus each other arm, paired by seed; an interval that holds 0 is no difference."""
    found: dict[str, Any] = {}
    cispo = {r["seed"]: r for r in runs["cispo"]}
    for arm in ARMS[1:]:
        pairs = [(cispo[r["seed"]], r) for r in runs[arm] if r["seed"] in cispo]
        if len(pairs) > 1:
            steps = [bounded_steps(a, threshold) - bounded_steps(b, threshold) for a, b in pairs]
            gain = [
                np.mean(a["curves"]["accuracy"]) - np.mean(b["curves"]["accuracy"])
                for a, b in pairs
            ]
            found[f"cispo - {arm}"] = {
                "num_seeds": len(pairs),
                "steps_to_threshold": interval(steps),
                "accuracy_over_all_steps": interval(gain),
            }
    return found


def report(options: argparse.Namespace) -> None:
    """Write what there is so far."""
    sweep = {arm: load(options, arm, options.rates, [options.sweep_seed]) for arm in ARMS}
    chosen, runs = {}, {}
    for arm in ARMS:
        if len(sweep[arm]) == len(options.rates):
            chosen[arm] = best_rate(sweep[arm], options.threshold)
            runs[arm] = load(options, arm, [chosen[arm]], options.seeds)
    results: dict[str, Any] = {
        "threshold": options.threshold,
        "num_steps": options.num_steps,
        "updates_per_step": 16,
        "sweep": [
            {
                "arm": r["arm"],
                "lr": r["lr"],
                "steps_to_threshold": steps_to(r["curves"]["accuracy"], options.threshold),
                "accuracy_over_all_steps": float(np.mean(r["curves"]["accuracy"])),
            }
            for arm in ARMS
            for r in sweep[arm]
        ],
        "arms": {
            arm: summarize(found, options.threshold)
            for arm, found in runs.items()
            if len(found) > 1
        },
        "differences": differences(runs, options.threshold) if len(runs) == len(ARMS) else {},
        "runs": [r for arm in ARMS for r in runs.get(arm, [])],
    }
    write(options.json, results)
    for arm, summary in results["arms"].items():
        print(arm, json.dumps(summary), flush=True)


def load(
    options: argparse.Namespace, arm: str, rates: Sequence[float], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Finished runs among those named."""
    paths = [
        curve_path(Run(arm, lr, seed), options.root, options.num_steps)
        for lr in rates
        for seed in seeds
    ]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def attempt(run: Run | None, options: argparse.Namespace) -> None:
    """Make a run, or without one the base, in a process of its own, unless it is there."""
    if run is not None and curve_path(run, options.root, options.num_steps).exists():
        return
    command = [sys.executable, "-m", "benchmarks.cispo_vs_dapo_vs_grpo", *sys.argv[1:]]
    command += ["--one", "base"] if run is None else ["--one", run.arm, f"{run.lr}", f"{run.seed}"]
    print("run", run.name if run else "base", flush=True)
    subprocess.run(command, check=True)
    with _REPORTING:
        report(options)


def attempt_all(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Make runs, `--jobs` at a time."""
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(partial(attempt, options=options), runs))


def plot(results: dict[str, Any], path: Path) -> None:
    """Mean accuracy by step, with the range over seeds (Fig. 2's axes at our scale)."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for arm in ARMS:
        of_arm = [r["curves"]["accuracy"] for r in results["runs"] if r["arm"] == arm]
        data = np.asarray(of_arm)
        steps = np.arange(1, data.shape[1] + 1)
        axes.plot(steps, data.mean(0), label=f"{arm}, lr {results['arms'][arm]['lr']:g}")
        axes.fill_between(steps, data.min(0), data.max(0), alpha=0.2)
    axes.set_xlabel("generation batches (16 updates each)")
    axes.set_ylabel("accuracy of sampled completions")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rates", type=float, nargs="*", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--sweep-seed", type=int, default=101)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3, 4, 5])
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--threshold", type=float, default=0.55)
    parser.add_argument("--one", nargs="*", help="used by itself: one run in this process")
    options = parser.parse_args()
    if options.one == ["base"]:
        make_base(options.root)
        return
    if options.one:
        arm, lr, seed = options.one
        make_run(Run(arm, float(lr), int(seed)), options.root, options.num_steps)
        return
    options.root.mkdir(parents=True, exist_ok=True)
    attempt(None, options)
    attempt_all([Run(arm, lr, options.sweep_seed) for lr in options.rates for arm in ARMS], options)
    rates = {
        arm: best_rate(load(options, arm, options.rates, [options.sweep_seed]), options.threshold)
        for arm in ARMS
    }
    # Seed by seed, so that an unfinished comparison is balanced.
    attempt_all([Run(arm, rates[arm], seed) for seed in options.seeds for arm in ARMS], options)
    report(options)
    if options.plot:
        plot(json.loads(options.json.read_text()), options.plot)


if __name__ == "__main__":
    main()
