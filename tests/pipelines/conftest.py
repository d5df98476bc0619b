import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RunMini = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def run_mini(m1) -> RunMini:
    """`m1 run` of the miniature recipe in a root, with overrides; returns its summary."""

    def run(root: Path, *overrides: str) -> dict[str, Any]:
        sets = [f"--set={o}" for o in (f"storage.root={root}", *overrides)]
        finished = m1("run", "tests/recipes/mini.toml", *sets)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        for shown in ("pretrain", "report", "lineage", "sums"):
            assert shown in finished.stdout  # display and final table, not swallowed by the log
        return json.loads((root / "latest" / "summary.json").read_text())

    return run


@pytest.fixture(scope="session")
def first_run(run_mini, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A run root after one undisturbed run, which later runs may add to, and its summary."""
    root = tmp_path_factory.mktemp("runs")
    return root, run_mini(root)
