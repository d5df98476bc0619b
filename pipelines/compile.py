"""Compilation of a recipe's pipeline to KFP's intermediate representation."""

from pathlib import Path

from kfp import compiler

from m1.config.schema import Recipe
from pipelines.m1 import build_pipeline


def compile_pipeline(recipe: Recipe, path: Path) -> None:
    """Write the pipeline as IR YAML; the same recipe gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(build_pipeline(recipe), str(path))
