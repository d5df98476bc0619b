"""Which reasoning-gym datasets can be trusted as rewards.

    python -m benchmarks.reasoning_gym_audit [--json OUT] [--instances N]

A dataset passes when each instance's own answer gets the full score; junk, an empty answer and the
question itself neither get it nor raise; and a median instance takes under 50 ms. Each is given
20 s.
"""

import argparse
import signal
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import write

_SECONDS = 20
_MEDIAN_SECONDS = 0.05
_JUNK = ("", " ", "I do not know.", "42", "[]", "None", "\x00", "-" * 50)


class _TooSlow(Exception):
    pass


def audit(name: str, num_instances: int) -> list[str]:
    """What is wrong with a dataset; empty when nothing is."""
    import reasoning_gym

    faults: set[str] = set()
    dataset = reasoning_gym.create_dataset(name, seed=1, size=num_instances)
    seconds = []
    for number in range(num_instances):
        started = time.perf_counter()
        entry = dataset[number]
        seconds.append(time.perf_counter() - started)
        answer = entry["answer"]
        if answer is None or _score(dataset, str(answer), entry, faults) < 1:
            faults.add("own answer rejected")
        for text in (*_JUNK, entry["question"]):
            if text.strip() != str(answer).strip() and _score(dataset, text, entry, faults) >= 1:
                faults.add("junk accepted")
    if statistics.median(seconds) > _MEDIAN_SECONDS:
        faults.add("slow")
    return sorted(faults)


def _score(dataset: Any, answer: str, entry: Any, faults: set[str]) -> float:
    try:
        return float(dataset.score_answer(answer, entry))
    except _TooSlow:
        raise
    except Exception as error:
        faults.add(f"raises {type(error).__name__}")
        return 0.0


def _stop(*_: object) -> None:
    raise _TooSlow


def main() -> None:
    """Audit all datasets."""
    from reasoning_gym.factory import DATASETS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--instances", type=int, default=10)
    arguments = parser.parse_args()
    signal.signal(signal.SIGALRM, _stop)
    found: dict[str, list[str]] = {}
    for name in sorted(DATASETS):
        if name == "composite":
            continue
        signal.alarm(_SECONDS)
        try:
            found[name] = audit(name, arguments.instances)
        except _TooSlow:
            found[name] = ["slow"]
        except Exception as error:
            found[name] = [f"cannot be made: {type(error).__name__}"]
        finally:
            signal.alarm(0)
        if found[name]:
            print(f"{name:28s} {', '.join(found[name])}", flush=True)
    passed = [name for name, faults in found.items() if not faults]
    print(f"{len(passed)} of {len(found)} pass")
    write(arguments.json, {"faults": found})


if __name__ == "__main__":
    main()
