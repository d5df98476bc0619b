"""Compilation of a recipe's pipeline to KFP's intermediate representation, or to manifests."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler

from m1.config.schema import Recipe
from m1.config.stages import canonical_json, image_digest
from m1.resolving import recipe_line
from pipelines.m1 import build_pipeline

VERSION_CHARACTERS = 12
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def compile_pipeline(recipe: Recipe, path: Path, only: str = "") -> None:
    """Write the pipeline as IR YAML; the same recipe gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(build_pipeline(recipe, only), str(path))


def compile_manifests(recipe: Recipe, path: Path, only: str = "", *, namespace: str) -> None:
    """Write a Pipeline and a PipelineVersion for `kubectl apply`, named by the content."""
    pipeline = build_pipeline(recipe, only)
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(
        pipeline,
        str(path),
        kubernetes_manifest_format=True,
        kubernetes_manifest_options=compiler.KubernetesManifestOptions(
            pipeline_name=pipeline.name,
            pipeline_version_name=version_name(recipe, only),
            namespace=namespace,
            include_pipeline_manifest=True,
        ),
    )


def version_name(recipe: Recipe, only: str = "") -> str:
    """Name of the version that `compile_pipeline` writes; see `version_of`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compile_pipeline(recipe, path, only)
        return version_of(path, recipe)


def version_of(path: Path, recipe: Recipe) -> str:
    """`<pipeline>-<hash12>` of a compiled pipeline, its recipe with the image, and the code.

    The compiler's own version is no part of it.
    """
    documents: list[Any] = list(yaml.load_all(path.read_text(), Loader=_LOADER))
    documents[0].pop("sdkVersion", None)
    content = {
        "pipeline": json.loads(json.dumps(documents)),
        "recipe": recipe_line(recipe),
        "code": image_digest(),
    }
    digest = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    return f"{documents[0]['pipelineInfo']['name']}-{digest[:VERSION_CHARACTERS]}"
