"""The sandbox stage: instances built, validated, and graded with and without their solution."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1.config.sandbox_tables import PairConfig, SandboxConfig
from m1.config.schema import Recipe
from m1.sandbox.base import Backend, SandboxError
from m1.sandbox.local import BubblewrapBackend
from m1.stage import StageContext, StageOutput
from m1.swe import building, sample
from m1.swe.builder import Pair, build_releases
from m1.swe.building import Outcome
from m1.swe.grade import grade
from m1.swe.instance import Instance, read_instances
from m1.swe.releases import IndexUnreachable
from m1.swe.store import EnvironmentStore
from m1.swe.validate import validate
from m1.types import M1Error

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltInstances:
    """What a finished stage hands on: instances and the store that holds their environments."""

    instances: tuple[Instance, ...]
    store: EnvironmentStore


def sandbox(context: StageContext, recipe: Recipe) -> StageOutput:
    """Build the recipe's pairs; layers that an interrupted attempt finished are kept.

    Raises:
        M1Error: Nothing can be isolated here, or no instance is sound.
    """
    config = recipe.sandbox
    assert config is not None
    try:
        backend = BubblewrapBackend()
    except SandboxError as error:
        raise M1Error(f"{error}; leave out [sandbox] to run without") from None
    store = EnvironmentStore(context.output)
    context.phase("building", 0, 2)
    outcome, source = _build(config, store, backend)
    if not outcome.instances:
        raise M1Error(
            "no instance of sandbox.pairs is sound: "
            + "; ".join(f"{r['name']}: {r['reason']}" for r in outcome.rejects)[:1000]
        )
    summary = building.write_outcome(context.output, outcome, store)
    context.phase("grading", 1, 2)
    grades = [
        check(instance, store, backend, test_seconds=config.test_seconds)
        for instance in outcome.instances
    ]
    metrics = {
        "sandbox/instances": float(summary["num_instances"]),
        "sandbox/rejected": float(summary["num_rejected"]),
        "sandbox/disk_mib": summary["disk_bytes"]["total"] / 2**20,
        "sandbox/gold_resolved": sum(g["gold"] for g in grades) / len(grades),
        "sandbox/empty_resolved": sum(g["empty"] for g in grades) / len(grades),
    }
    context.log(metrics, step=1, total=1)
    return StageOutput(metadata={"source": source, "grades": grades, "rejects": outcome.rejects})


def load(folder: Path) -> BuiltInstances:
    """The instances in a finished stage's output, `context.path_of("sandbox")` in later ones."""
    instances = read_instances(folder / "instances.jsonl")
    return BuiltInstances(tuple(instances), EnvironmentStore(folder))


def check(
    instance: Instance, store: EnvironmentStore, backend: Backend, *, test_seconds: float
) -> dict[str, Any]:
    """Grade the gold patch and the empty one.

    Raises:
        M1Error: Gold does not resolve the instance, or nothing does not leave it unresolved.
    """
    gold = grade(instance, instance.patch, store, backend, test_seconds=test_seconds)
    empty = grade(instance, "", store, backend, test_seconds=test_seconds)
    if gold.infra_error or empty.infra_error or not gold.resolved or empty.resolved:
        raise M1Error(
            f"{instance.instance_id} was validated, but its gold patch is graded "
            f"{gold.resolved} ({gold.infra_error or gold.problems or gold.failed[:3]}) and the "
            f"empty one {empty.resolved}; run m1 sandbox validate on it"
        )
    return {"instance_id": instance.instance_id, "gold": gold.resolved, "empty": empty.resolved}


def _build(config: SandboxConfig, store: EnvironmentStore, backend: Backend) -> tuple[Outcome, str]:
    """What was built, and from where: the package index, or our own project."""
    rows = [_pair(pair) for pair in config.pairs]
    if rows:
        try:
            outcome = building.build_rows(
                rows,
                store,
                backend,
                num_runs=config.num_runs,
                num_parallel=config.num_parallel,
                test_seconds=config.test_seconds,
            )
            return outcome, "package index"
        except IndexUnreachable as error:
            log.warning("%s: building the project of our own instead", error)
    return build_sample(store, backend, num_runs=config.num_runs), "sample"


def build_sample(store: EnvironmentStore, backend: Backend, *, num_runs: int = 3) -> Outcome:
    """The instance of `m1.swe.sample`, validated."""
    built = build_releases(sample.release("0.1.0"), sample.release("0.1.1"), store, backend)
    found = validate(built.instance, store, backend, num_runs=num_runs)
    outcome = Outcome(validations=[found])
    if found.is_valid:
        outcome.instances.append(built.instance)
    else:
        outcome.rejects.append({"name": built.instance.instance_id, "reason": building.why(found)})
    return outcome


def _pair(pair: PairConfig) -> Pair:
    return Pair.model_validate(
        {
            "package": pair.package,
            "base_version": pair.base_version,
            "fix_version": pair.fix_version,
            "base_sdist": {"sha256": pair.base_sha256},
            "fix_sdist": {"sha256": pair.fix_sha256},
        }
    )
