"""Cost of solving against difficulty for every logic task, and time to generate.

    python -m benchmarks.logic_difficulty [--json OUT] [--plot OUT.png] [--instances N]

The cost is what each task's simple solver needs: nodes of a backtracking search for grids, choices
for permutations, statements or operations for stories (`LogicTask.cost`).
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import write
from m1.data.logic.catalogue import LOGIC_TASKS

DIFFICULTIES = (1, 2, 4, 6, 8, 10)


def measure(num_instances: int) -> dict[str, Any]:
    """By task: median cost and median milliseconds of generation at each difficulty."""
    found: dict[str, Any] = {}
    for name, task in LOGIC_TASKS.items():
        costs, times = [], []
        for difficulty in DIFFICULTIES:
            seconds, own = [], []
            for seed in range(num_instances):
                started = time.perf_counter()
                puzzle = task.generate(seed, difficulty)
                seconds.append(time.perf_counter() - started)
                own.append(task.cost(puzzle.metadata))
            costs.append(statistics.median(own))
            times.append(1e3 * statistics.median(seconds))
        found[name] = {"cost": costs, "generation_ms": times}
        print(f"{name:32s} cost " + " ".join(f"{c:.3g}" for c in costs), flush=True)
    return found


def plot(path: Path, found: dict[str, Any]) -> None:
    """Cost relative to difficulty 1, a line a task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 16), layout="constrained")
    axes = figure.subplots(7, 6, sharex=True).flatten()
    for ax, (name, rows) in zip(axes, found.items(), strict=False):
        ax.plot(DIFFICULTIES, rows["cost"], marker="o", markersize=3)
        ax.set_yscale("log")
        ax.set_title(name, fontsize=8)
        ax.tick_params(labelsize=6)
    figure.supxlabel("difficulty")
    figure.supylabel("median cost of a simple solver")
    figure.savefig(path, dpi=100)


def main() -> None:
    """Measure, print, write, plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--instances", type=int, default=15)
    arguments = parser.parse_args()
    found = measure(arguments.instances)
    slow = {n: r for n, r in found.items() if max(r["generation_ms"]) > 50}
    print(f"{len(found)} tasks; over 50 ms median generation: {sorted(slow) or 'none'}")
    write(arguments.json, {"difficulties": DIFFICULTIES, "results": found})
    if arguments.plot:
        plot(arguments.plot, found)


if __name__ == "__main__":
    main()
