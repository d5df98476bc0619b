"""How fast sandboxes start, and how many episodes a second they carry, beside their peers.

    python -m benchmarks.sandbox [--json OUT] [--starts 50] [--episodes 40] [--grades 20]
                                 [--instances FOLDER] [--only-grades]
                                 [--podman 'podman --storage-driver overlay'] [--image IMAGE]

Start: from nothing to the end of a first command that does nothing. Episode: open, put a package
and its test, edit, run the test, read the diff, close. Peers on the same machine in the same
minutes, where installed: SWE-ReX local deployment (`pip install swe-rex`; no isolation at
all) and podman with the limits of ours (needs an image with python3, `--image`). `python` is the
episode's test as a plain process: what no sandbox can go below. Grade: the gold patch of our own
small instance (and of those that `m1 sandbox build` put into FOLDER), from nothing to the verdict,
in turn with `python -m pytest` on its mended tree. The load of the machine is recorded, because the
figures mean nothing without it.
"""

import argparse
import asyncio
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.machine import write
from m1.sandbox import bubblewrap, cgroup
from m1.sandbox.base import Limits
from m1.sandbox.farm.leasing import Farm, FarmConfig
from m1.sandbox.local import BubblewrapBackend, can_overlay
from m1.swe import sample
from m1.swe.builder import build_releases
from m1.swe.grade import grade
from m1.swe.instance import Instance, read_instances
from m1.swe.python import interpreter
from m1.swe.store import EnvironmentStore
from m1.swe.suite import VARIABLES

PARALLEL = (1, 2, 4, 8)
LIMITS = Limits(cpu_seconds=20, wall_seconds=60, memory_mib=256, scratch_mib=16, num_files=2000)
BASE = "def add(a, b):\n    return a - b\n"
TEST = "from calc import add\nassert add(2, 3) == 5\n"
SCRIPT = (
    "cp calc.py before.py && sed -i 's/a - b/a + b/' calc.py && python3 -S test_calc.py "
    "; code=$?; diff before.py calc.py; exit $code"
)
FILL = f"printf '%s' '{BASE}' > calc.py; printf '%s' '{TEST}' > test_calc.py; "
Episode = Callable[[], None]


def ours_start(backend: BubblewrapBackend) -> Episode:
    """Open, nothing, close."""

    def run() -> None:
        with backend.open(limits=LIMITS) as sandbox:
            assert sandbox.exec(["true"]).exit_code == 0

    return run


def ours_episode(backend: BubblewrapBackend) -> Episode:
    """Open, put two files, edit and test, close: three commands."""

    def run() -> None:
        with backend.open(limits=LIMITS) as sandbox:
            sandbox.write_file("calc.py", BASE.encode())
            sandbox.write_file("test_calc.py", TEST.encode())
            result = sandbox.exec(["sh", "-c", SCRIPT])
            assert result.exit_code == 0
            assert b"return a + b" in result.stdout

    return run


def plain_episode() -> None:
    """The same commands in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["sh", "-c", FILL + SCRIPT], cwd=folder, check=True, capture_output=True)


def podman_run(program: str, image: str, script: str) -> Episode:
    """One container for one script, with bounds like ours."""
    command = [
        *shlex.split(program),
        *("--runtime", "runc", "run", "--rm", "--network", "none", "--read-only"),
        *("--tmpfs", "/work:size=16m,mode=1777", "--workdir", "/work", "--memory", "256m"),
        *("--memory-swap", "256m", "--pids-limit", "64", "--cap-drop", "ALL", "--user", "1000"),
        *("--security-opt", "no-new-privileges", "--ulimit", "nofile=20000:20000"),
        *("--ulimit", "nproc=4096:4096", image, "sh", "-c", script),
    ]

    def run() -> None:
        subprocess.run(command, check=True, capture_output=True)

    return run


def swe_rex(script: str) -> Episode:
    """A local deployment, one command, stopped."""
    from swerex.deployment.local import LocalDeployment  # type: ignore[import-not-found]
    from swerex.runtime.abstract import Command  # type: ignore[import-not-found]

    async def run_in(folder: str) -> None:
        deployment = LocalDeployment()
        await deployment.start()
        found = await deployment.runtime.execute(Command(command=["sh", "-c", script], cwd=folder))
        assert found.exit_code == 0
        await deployment.stop()

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(run_in(folder))

    return run


def quantiles(episode: Episode, number: int) -> dict[str, float]:
    """Milliseconds of one after another."""
    episode()
    taken, before = [], _cpu_seconds()
    for _ in range(number):
        started = time.perf_counter()
        episode()
        taken.append(1e3 * (time.perf_counter() - started))
    cuts = statistics.quantiles(taken, n=10)
    cpu = 1e3 * (_cpu_seconds() - before) / number
    return {
        "p50_ms": statistics.median(taken),
        "p90_ms": cuts[8],
        "min_ms": min(taken),
        "cpu_ms": cpu,
    }


def _cpu_seconds() -> float:
    """Of this process and its children that were waited for; neighbours change it little."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))


def per_second(episode: Episode, number: int, threads: int) -> float:
    """Episodes a second."""
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(lambda _: episode(), range(number)))
        return number / (time.perf_counter() - started)


def warm_start(backend: BubblewrapBackend, number: int) -> dict[str, float]:
    """The farm's lease of a sandbox that was opened ahead, and its first command."""
    with Farm(backend, FarmConfig(max_sandboxes=1, num_warm=4)) as farm:

        def run() -> None:
            with farm.lease(limits=LIMITS) as sandbox:
                sandbox.exec(["true"])

        return quantiles(run, number)


def grading(backend: BubblewrapBackend, number: int, built: Path | None) -> list[dict[str, Any]]:
    """A whole grade and pytest by itself, of our own small instance and of those of a build."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        store = EnvironmentStore(Path(folder) / "store")
        releases = sample.release("0.1.0"), sample.release("0.1.1")
        instance = build_releases(*releases, store, backend).instance
        rows = [beside_pytest(instance, store, backend, number)]
    for instance in read_instances(built / "instances.jsonl") if built else ():
        rows.append(beside_pytest(instance, EnvironmentStore(built), backend, number))
        print(rows[-1], flush=True)
    return rows


def beside_pytest(
    instance: Instance, store: EnvironmentStore, backend: BubblewrapBackend, number: int
) -> dict[str, Any]:
    """Milliseconds of a grade and of `python -m pytest` on the same tree and tests, in turns."""
    given = instance.environment
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        for kind, key in (("trees", given.tree), ("tests", given.tests)):
            for name, data in store.read(kind, key).items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            if kind == "trees":
                patch = instance.patch.encode("utf-8", "surrogateescape")
                subprocess.run(["git", "apply", "-"], cwd=folder, input=patch, check=True)
        roots = (str(store.folder("sites", given.site)), *given.python_path)
        variables = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(roots), **VARIABLES}
        variables["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        command = [*interpreter(store).command, "-s", "-m", "pytest", "-q"]
        command += ["-p", "no:cacheprovider", "-o", "addopts="]
        command += [part for plugin in given.plugins for part in ("-p", plugin)]

        def ours() -> None:
            assert grade(instance, instance.patch, store, backend).resolved

        def plain() -> None:  # a test that needs what the instance leaves out may fail
            whole = [*command, *given.test_files]
            done = subprocess.run(whole, cwd=folder, env=variables, capture_output=True)
            assert done.returncode in (0, 1), done.stdout[-500:]

        taken: dict[Episode, list[float]] = {ours: [], plain: []}
        load = os.getloadavg()[0]
        for episode in [ours, plain] * (number + 1):
            started = time.perf_counter()
            episode()
            taken[episode].append(1e3 * (time.perf_counter() - started))
    grades, runs = taken[ours][1:], taken[plain][1:]
    pairs = [one / other - 1 for one, other in zip(grades, runs, strict=True)]
    return {
        "instance": instance.instance_id,
        "num_tests": len(instance.fail_to_pass) + len(instance.pass_to_pass),
        "load_before": load,
        "grade_p50_ms": statistics.median(grades),
        "pytest_p50_ms": statistics.median(runs),
        "overhead_fraction": statistics.median(grades) / statistics.median(runs) - 1,
        "overhead_of_pairs_quartiles": statistics.quantiles(pairs, n=4),
        "least_ms": [min(grades), min(runs)],
    }


def peers(podman: str, image: str) -> dict[str, tuple[Episode, Episode]]:
    """Start and episode of what is installed here."""
    found: dict[str, tuple[Episode, Episode]] = {
        "python": (lambda: subprocess.run(["true"], check=True) and None, plain_episode)
    }
    if find_spec("swerex"):
        found["swe-rex local"] = swe_rex("true"), swe_rex(FILL + SCRIPT)
    if shutil.which("podman"):
        start = podman_run(podman, image, "true")
        try:
            start()
            found["podman"] = start, podman_run(podman, image, FILL + SCRIPT)
        except subprocess.CalledProcessError as error:
            print("podman cannot start containers here:", error.stderr.decode()[-500:])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--starts", type=int, default=50)
    parser.add_argument("--episodes", type=int, default=40)
    parser.add_argument("--grades", type=int, default=20)
    parser.add_argument("--instances", type=Path, help="folder of m1 sandbox build: graded too")
    parser.add_argument("--only-grades", action="store_true")
    parser.add_argument("--podman", default="podman", help="with its global options")
    parser.add_argument("--image", default="localhost/python:1")
    arguments = parser.parse_args()
    backend = BubblewrapBackend()
    ours = ours_start(backend), ours_episode(backend)
    rows: dict[str, dict[str, Any]] = {"bubblewrap": {}}
    runs: dict[str, tuple[Episode, Episode]] = {}
    if not arguments.only_grades:
        runs = {"bubblewrap": ours, **peers(arguments.podman, arguments.image)}
    for name, (start, episode) in runs.items():
        load = os.getloadavg()[0]
        rows[name] = {"load_before": load, "start": quantiles(start, arguments.starts)}
        rows[name]["episodes_per_second"] = {
            threads: per_second(episode, arguments.episodes, threads) for threads in PARALLEL
        }
        print(name, rows[name], flush=True)
    if runs:
        rows["bubblewrap"]["warm_start"] = warm_start(backend, arguments.starts)
        print("warm", rows["bubblewrap"]["warm_start"])
    rows["bubblewrap"]["grade"] = grading(backend, arguments.grades, arguments.instances)
    print("grade", rows["bubblewrap"]["grade"])
    about = {
        "cores": os.cpu_count(),
        "cgroup": cgroup.version(),
        "weak": bubblewrap.weaknesses(),
        "overlay": can_overlay(),
    }
    write(arguments.json, {**about, "results": rows})


if __name__ == "__main__":
    main()
