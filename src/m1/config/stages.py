"""Which part of a recipe each stage depends on, and the hash that names its output.

stage hash = sha256(canonical JSON of {stage, resolved slice, image digest, parents' hashes}).
Storage, tracking and resources are in no slice, so that moving a run does not repeat it.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from m1.config.schema import Recipe


@dataclass(frozen=True)
class StageSpec:
    """What a stage reads: recipe fields (dotted) and earlier stages."""

    fields: tuple[str, ...]
    parents: tuple[str, ...]


STAGES: dict[str, StageSpec] = {
    "data": StageSpec(fields=("seed", "data"), parents=()),
    "sandbox": StageSpec(fields=("sandbox",), parents=()),
    "pretrain": StageSpec(fields=("seed", "model", "pretrain"), parents=("data",)),
    "sft": StageSpec(fields=("seed", "model", "sft"), parents=("data", "pretrain")),
    "rl": StageSpec(fields=("seed", "model", "rl"), parents=("data", "sandbox", "pretrain", "sft")),
    "evaluate": StageSpec(
        fields=("seed", "model", "evaluate"),
        parents=("data", "sandbox", "pretrain", "sft", "rl"),
    ),
    "register": StageSpec(fields=("model", "register"), parents=("data", "pretrain", "sft", "rl")),
}
"""Every stage in order of execution. Parents absent from a recipe are left out."""


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """Names of the recipe's stages in order of execution."""
    dumped = recipe.model_dump(by_alias=True)
    return tuple(name for name in STAGES if dumped.get(name) is not None)


def parents_of(stage: str, recipe: Recipe) -> tuple[str, ...]:
    """The stages of this recipe whose outputs `stage` reads."""
    present = stages_of(recipe)
    return tuple(parent for parent in STAGES[stage].parents if parent in present)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: one text for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def recipe_hash(recipe: Recipe) -> str:
    """sha256 of what the recipe computes (no storage, no tracking) and of the code that does it."""
    dumped = recipe.model_dump(mode="json", by_alias=True, exclude={"storage", "tracking"})
    return _sha256({"recipe": dumped, "image": image_digest()})


def stage_slice(stage: str, recipe: Recipe) -> dict[str, Any]:
    """The resolved fields that `stage` depends on."""
    dumped = recipe.model_dump(mode="json", by_alias=True)
    return {field: dumped[field] for field in STAGES[stage].fields}


def stage_hashes(recipe: Recipe) -> Mapping[str, str]:
    """Hash of every stage of the recipe, hexadecimal."""
    hashes: dict[str, str] = {}
    for stage in stages_of(recipe):
        hashes[stage] = _sha256(
            {
                "stage": stage,
                "slice": stage_slice(stage, recipe),
                "image": image_digest(),
                "parents": {parent: hashes[parent] for parent in parents_of(stage, recipe)},
            }
        )
    return hashes


@cache
def image_digest() -> str:
    """Identity of the running code: M1_IMAGE_DIGEST, else the digest of the sources."""
    given = os.environ.get("M1_IMAGE_DIGEST")
    if given:
        return given
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for root in (package, *_kernel_package()):
        for path in sorted(p for p in root.rglob("*") if p.suffix in _SOURCE_SUFFIXES):
            relative = path.relative_to(root)
            if root == package and relative.parts[0] in _NOT_COMPUTING:
                continue
            digest.update(f"{root.name}/{relative}".encode() + b"\0" + path.read_bytes() + b"\0")
    return f"source:{digest.hexdigest()[:16]}"


_SOURCE_SUFFIXES = frozenset({".py", ".c", ".h"})
_NOT_COMPUTING = frozenset(
    {
        "cli.py",
        "cli_convert.py",
        "cli_plan.py",
        "cli_recipe.py",
        "cli_sandbox_swe.py",
        "config",
        "doctor.py",
        "doctor_remote.py",
        "launch.py",
        "pipeline.py",
        "plan",
        "rank.py",
        "ranks.py",
        "tracking",
        "ui.py",
    }
)
"""Parts of the package that cannot change what a stage computes from a resolved recipe."""


def _kernel_package() -> list[Path]:
    spec = importlib.util.find_spec("m1_kernels")
    return [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []


def _sha256(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
