"""Which part of a recipe each stage depends on, and the hash that names its output.

stage hash = sha256(canonical JSON of {stage, resolved slice, image digest, parents' hashes}).
Storage, tracking and resources are in no slice, so that moving a run does not repeat it.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from m1.config.schema import Recipe, RlConfig


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
"""Every kind of stage in order of execution. Parents absent from a recipe are left out.

`rl` with `lengths` becomes one stage a length, `rl_<max_new_tokens>`, each with the one before
among its parents."""

_LENGTH = "rl_"


def stage_kind(name: str) -> str:
    """The entry of `STAGES` that describes a stage: `rl` for `rl_40960`."""
    return "rl" if name.startswith(_LENGTH) else name


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names of stages in order of execution; what is no stage is left out."""
    kinds = list(STAGES)

    def place(name: str) -> tuple[int, int]:
        length = name.removeprefix(_LENGTH)
        return kinds.index(stage_kind(name)), int(length) if length != name else 0

    return tuple(sorted({n for n in names if stage_kind(n) in STAGES}, key=place))


def parents_among(stage: str, names: Iterable[str]) -> tuple[str, ...]:
    """The stages among `names` whose outputs `stage` reads, in order of execution."""
    kind = stage_kind(stage)
    earlier = in_order(names)
    parents = [n for n in earlier if stage_kind(n) in STAGES[kind].parents]
    if kind == "rl" and stage in earlier:
        parents += [n for n in earlier[: earlier.index(stage)] if stage_kind(n) == "rl"][-1:]
    return tuple(parents)


def model_stages(names: Iterable[str]) -> tuple[str, ...]:
    """The stages among `names` that make a model, in order of execution."""
    return tuple(n for n in in_order(names) if stage_kind(n) in ("pretrain", "sft", "rl"))


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """Names of the recipe's stages in order of execution."""
    dumped = recipe.model_dump(by_alias=True)
    names = [name for name in STAGES if dumped.get(name) is not None]
    if recipe.rl is not None and recipe.rl.lengths:
        names.remove("rl")
        names += [f"{_LENGTH}{length.max_new_tokens}" for length in recipe.rl.lengths]
    return in_order(names)


def parents_of(stage: str, recipe: Recipe) -> tuple[str, ...]:
    """The stages of this recipe whose outputs `stage` reads."""
    return parents_among(stage, stages_of(recipe))


def rl_config(stage: str, recipe: Recipe) -> RlConfig:
    """The rl table in force in an RL stage: with its length's values, and `lengths` that one.

    Raises:
        ValueError: The recipe has no such stage.
    """
    if recipe.rl is None or stage not in stages_of(recipe):
        raise ValueError(f"recipe {recipe.name} has no RL stage {stage!r}")
    config = recipe.rl
    if not config.lengths:
        return config
    (length,) = [n for n in config.lengths if stage == f"{_LENGTH}{n.max_new_tokens}"]
    optimizer, loss = config.optimizer, config.loss
    if length.max_grad_norm is not None:
        optimizer = optimizer.model_copy(update={"max_grad_norm": length.max_grad_norm})
    if length.clip_eps_high is not None:
        loss = loss.model_copy(update={"clip_eps_high": length.clip_eps_high})
    sampling = config.sampling.model_copy(update={"max_new_tokens": length.max_new_tokens})
    return config.model_copy(
        update={
            "num_steps": length.max_steps,
            "optimizer": optimizer,
            "loss": loss,
            "sampling": sampling,
            "lengths": (length,),
        }
    )


PLACES = ("storage", "tracking", "resources", "ci")
"""Tables that say where a recipe runs and what becomes of it, not what it computes."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: one text for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def recipe_hash(recipe: Recipe) -> str:
    """sha256 of what the recipe computes and of the code that does it, wherever it runs."""
    dumped = recipe.model_dump(mode="json", by_alias=True, exclude=set(PLACES))
    return _sha256({"recipe": dumped, "image": image_digest()})


def stage_slice(stage: str, recipe: Recipe) -> dict[str, Any]:
    """The resolved fields that `stage` depends on."""
    dumped = recipe.model_dump(mode="json", by_alias=True)
    if stage_kind(stage) == "rl":
        config = rl_config(stage, recipe)
        dumped["rl"] = config.model_dump(mode="json", by_alias=True)
        if not config.lengths:
            del dumped["rl"]["gate"]  # nothing reads it
    return {field: dumped[field] for field in STAGES[stage_kind(stage)].fields}


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
        "cli_lineage.py",
        "cli_plan.py",
        "cli_recipe.py",
        "cli_rollouts.py",
        "cli_sandbox_swe.py",
        "cli_cluster.py",
        "cli_ci.py",
        "conclusion.py",
        "recipe_changes.py",
        "cli_services.py",
        "config",
        "doctor.py",
        "doctor_remote.py",
        "launch.py",
        "launcher",
        "pipeline.py",
        "plan",
        "profiles.py",
        "rank.py",
        "resolving.py",
        "service_alone.py",
        "service_files.py",
        "services.py",
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
