"""Short programs a second through the code verifier and the reward service.

    python -m benchmarks.code_throughput [--json OUT] [--programs N] [--workers W]

A job is a sandbox opened, one test run in it, and closed; every program is another one, so no
verdict is remembered. Beside it the same programs as plain processes without any isolation, in the
same minute. The load of the machine is recorded, because wall time means nothing without it;
processor time counts everything: service, workers, boxes and programs.
"""

import argparse
import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from benchmarks.machine import write
from m1.rewards.service.pool import RewardService, ServiceConfig
from m1.sandbox import bubblewrap, cgroup
from m1.types import Task


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--programs", type=int, default=400)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8])
    arguments = parser.parse_args()
    suite = json.dumps({"tests": [{"input": "4\n", "output": "5\n"}]})
    task = Task("next", "benchmark", "Print the next number.", suite, "code")
    rows = []
    for workers in arguments.workers:
        with RewardService(ServiceConfig(num_workers=workers)) as service:
            warm = [(task, f"print(int(input()) + 1)  # warm {i}") for i in range(2 * workers)]
            list(service.judge_all(warm))
            load_before, cpu_before = os.getloadavg()[0], _cpu_seconds()
            started = time.perf_counter()
            jobs = ((task, f"print(int(input()) + 1)  # {i}") for i in range(arguments.programs))
            found = list(service.judge_all(jobs))
            seconds = time.perf_counter() - started
            cpu = _cpu_seconds() - cpu_before
        assert all(j.verdict is not None and j.verdict.accuracy == 1 for j in found)
        plain = _plain_per_second(arguments.programs, workers)
        rows.append(
            {
                "workers": workers,
                "programs_per_second": arguments.programs / seconds,
                "plain_processes_per_second": plain,
                "load_before": load_before,
                "cpu_ms_per_program": 1e3 * cpu / arguments.programs,
            }
        )
        print("  ".join(f"{k} {v:.1f}" for k, v in rows[-1].items()), flush=True)
    about = {"cores": os.cpu_count(), "cgroup": cgroup.version(), "weak": bubblewrap.weaknesses()}
    write(arguments.json, {**about, "results": rows})


def _plain_per_second(count: int, workers: int) -> float:
    def run(number: int) -> bytes:
        program = f"print(int(input()) + 1)  # {number}"
        command = ["/usr/bin/python3", "-I", "-S", "-c", program]
        return subprocess.run(command, input=b"4\n", capture_output=True, check=True).stdout

    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as threads:
        assert set(threads.map(run, range(count))) == {b"5\n"}
    return count / (time.perf_counter() - started)


def _cpu_seconds() -> float:
    """Processor time of this process and of all below it, dead ones included."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:4]) for process in processes)


if __name__ == "__main__":
    main()
