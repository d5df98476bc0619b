"""A pipeline run on this machine through KFP's local runner: every task is a subprocess."""

import contextlib
import logging
import shutil
import sys
import warnings
from pathlib import Path

from kfp import components as kfp_components
from kfp import local

from m1.config.schema import Recipe
from pipelines.m1 import build_pipeline


def run_locally(recipe: Recipe, *, pipeline_root: Path, log: Path) -> None:
    """Run the recipe's pipeline; what tasks print goes to `log`.

    Raises:
        RuntimeError: A task failed.
    """
    with _runner(pipeline_root, log):
        build_pipeline(recipe)()


def run_compiled(path: Path, *, pipeline_root: Path, log: Path) -> None:
    """Run a compiled pipeline from its IR YAML."""
    with _runner(pipeline_root, log):
        kfp_components.load_component_from_file(str(path))()


@contextlib.contextmanager
def _runner(pipeline_root: Path, log: Path):  # type: ignore[no-untyped-def]
    log.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(pipeline_root, ignore_errors=True)  # artifacts of earlier attempts: pointers only
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(pipeline_root))
    with log.open("a") as file, warnings.catch_warnings(), contextlib.redirect_stdout(file):
        warnings.simplefilter("ignore")
        handler = logging.StreamHandler(file)
        root = logging.getLogger()
        saved, root.handlers = root.handlers, [handler]
        stderr, sys.stderr = sys.stderr, file
        try:
            yield
        finally:
            root.handlers, sys.stderr = saved, stderr
