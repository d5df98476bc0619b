"""The maths verifier beside math-verify's own defaults on the hand-checked pairs of the tests.

    python -m benchmarks.math_verifier [--json OUT]

Ours runs through the reward service, as in training; math-verify in this process with its own time
limits, on the same answers and references wrapped in `$...$` unless they have marks already.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import write
from m1.rewards.service.pool import RewardService, ServiceConfig
from m1.types import Task

PAIRS = Path(__file__).parents[1] / "tests/unit/rewards/data/maths_pairs.jsonl"
LABELS = ("equal", "different", "hostile")


def measure(name: str, judge: Callable[[str, str], bool], pairs: list[dict[str, str]]) -> Any:
    """Accuracy by label, wrong verdicts and seconds of one verifier."""
    wrong: dict[str, list[tuple[str, str]]] = {label: [] for label in LABELS}
    seconds = []
    for pair in pairs:
        started = time.perf_counter()
        is_equal = judge(pair["reference"], pair["answer"])
        seconds.append(time.perf_counter() - started)
        if is_equal != (pair["label"] == "equal"):
            wrong[pair["label"]].append((pair["reference"][:60], pair["answer"][:60]))
    counts = {label: sum(pair["label"] == label for pair in pairs) for label in LABELS}
    num_wrong = sum(map(len, wrong.values()))
    return {
        "name": name,
        "accuracy": 1 - num_wrong / len(pairs),
        "accuracy_by_label": {label: 1 - len(wrong[label]) / counts[label] for label in LABELS},
        "false_positives": len(wrong["different"]) + len(wrong["hostile"]),
        "p50_ms": 1e3 * float(np.quantile(seconds, 0.5)),
        "p95_ms": 1e3 * float(np.quantile(seconds, 0.95)),
        "longest_seconds": max(seconds),
        "wrong": wrong,
    }


def by_math_verify(reference: str, answer: str) -> bool:
    """math-verify with its defaults; an exception of it counts as different."""
    from math_verify import parse, verify

    try:
        return bool(verify(parse(_marked(reference)), parse(_marked(answer))))
    except Exception:
        return False


def _marked(text: str) -> str:
    return text if "$" in text or "boxed" in text else f"${text}$"


def main() -> None:
    """Print both and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    pairs = [json.loads(line) for line in PAIRS.open()]
    with RewardService(ServiceConfig(num_workers=1, cache_entries=0)) as service:

        def ours(reference: str, answer: str) -> bool:
            verdict = service.judge(Task("", "", "", reference, "maths"), answer).verdict
            return verdict is not None and verdict.accuracy == 1

        ours("1", r"\sqrt{1}")  # start the worker
        results = [measure("ours", ours, pairs)]
    results.append(measure("math-verify", by_math_verify, pairs))
    for result in results:
        shares = "  ".join(f"{k} {100 * v:.1f}%" for k, v in result["accuracy_by_label"].items())
        print(
            f"{result['name']:12s} {100 * result['accuracy']:.1f}% ({shares})  false positives "
            f"{result['false_positives']}  p50 {result['p50_ms']:.2f} ms  p95 "
            f"{result['p95_ms']:.1f} ms  longest {result['longest_seconds']:.2f} s"
        )
    write(arguments.json, {"num_pairs": len(pairs), "results": results})


if __name__ == "__main__":
    main()
