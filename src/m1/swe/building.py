"""From a file of pairs and mutations to a folder of instances: built, then proven to be sound.

OUT/instances.jsonl     what passed validation
OUT/instances/ID.json   the same, one file each
OUT/rejects.json        what did not, with the reason
OUT/summary.json        counts, and disk use by kind of layer
OUT/{sites,trees,...}   the layers (m1.swe.store)
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from m1.sandbox.base import Backend
from m1.storage import atomic_write
from m1.swe.builder import Built, Pair, Rejected, build_pair
from m1.swe.instance import Instance, write_instances
from m1.swe.mutation import Mutation, build_mutant, healthy
from m1.swe.releases import IndexUnreachable, PackageIndex, ReleaseError
from m1.swe.store import EnvironmentStore, SiteError
from m1.swe.validate import Validation, validate
from m1.types import M1Error


class MutantRow(BaseModel):
    """One mutation of one release; a row of a pairs file."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    package: str
    version: str
    sdist: Mapping[str, str]
    mutation: Mapping[str, Any]


Row = Pair | MutantRow


@dataclass
class Outcome:
    """All that a build made and refused."""

    instances: list[Instance] = field(default_factory=list)
    rejects: list[dict[str, str]] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)


def read_rows(path: Path) -> list[Row]:
    """Rows of a pairs file: a JSON array of pairs of releases and of mutations.

    Raises:
        M1Error: It is none; names the row and what is wrong with it.
    """
    try:
        rows = json.loads(path.read_text())
    except OSError as error:
        raise M1Error(f"{path} cannot be read: {error.strerror}; check the path") from None
    except json.JSONDecodeError as error:
        raise M1Error(f"{path} is no JSON: {error}; mend it") from None
    if not isinstance(rows, list):
        raise M1Error(f"{path} holds {type(rows).__name__}, but should be an array of pairs")
    return [_row(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]


def _row(row: Any, where: str) -> Row:
    kind: type[Pair] | type[MutantRow] = (
        MutantRow if isinstance(row, dict) and "mutation" in row else Pair
    )
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise M1Error(f"{where}: {name}: {first['msg']}; mend the row") from None


def build_rows(
    rows: Sequence[Row],
    store: EnvironmentStore,
    backend: Backend,
    *,
    num_runs: int = 3,
    num_parallel: int = 1,
    test_seconds: float = 60.0,
    report: Callable[[str, str], None] = lambda name, what: None,
) -> Outcome:
    """Build and validate every row; what fails is rejected with its reason, the rest goes on.

    Raises:
        IndexUnreachable: A release is needed that is not in the store, and no index answers.
    """
    index = PackageIndex(store.archives)
    outcome = Outcome()

    def one(row: Row) -> tuple[str, Built | None, str, Validation | None]:
        name = _name(row)
        try:
            built = _build(row, index, store, backend, test_seconds)
        except (Rejected, ReleaseError, SiteError) as error:
            report(name, f"rejected: {error}")
            return name, None, str(error), None
        found = validate(
            built.instance, store, backend, num_runs=num_runs, test_seconds=test_seconds
        )
        report(name, "valid" if found.is_valid else f"quarantined: {why(found)}")
        return name, built, "", found

    with ThreadPoolExecutor(num_parallel) as threads:
        for name, built, reason, found in threads.map(one, rows):
            if found is not None:
                outcome.validations.append(found)
                reason = "" if found.is_valid else why(found)
            if built is not None and not reason:
                outcome.instances.append(built.instance)
            else:
                outcome.rejects.append({"name": name, "reason": reason})
    return outcome


def why(found: Validation) -> str:
    """The reason of a quarantine in one line."""
    if found.infra_error:
        return f"infrastructure: {found.infra_error}"
    more = f" (and {len(found.reasons) - 1} more)" if len(found.reasons) > 1 else ""
    return found.reasons[0] + more


def _name(row: Row) -> str:
    if isinstance(row, Pair):
        return f"{row.package} {row.base_version} -> {row.fix_version}"
    place = f"{row.mutation.get('file')}:{row.mutation.get('line')}"
    return f"{row.package} {row.version} {place} {row.mutation.get('operator')}"


def _build(
    row: Row,
    index: PackageIndex,
    store: EnvironmentStore,
    backend: Backend,
    test_seconds: float,
) -> Built:
    if isinstance(row, Pair):
        return build_pair(row, index, store, backend, test_seconds=test_seconds)
    release = index.fetch(row.package, row.version, sha256=row.sdist.get("sha256"))
    package = healthy(release, store, backend, test_seconds=test_seconds)
    try:
        mutation = Mutation(**row.mutation)
    except TypeError as error:
        raise Rejected(f"the mutation does not parse: {error}") from None
    return build_mutant(package, mutation, store, backend, test_seconds=test_seconds)


def write_outcome(folder: Path, outcome: Outcome, store: EnvironmentStore) -> dict[str, Any]:
    """Write the instances, the rejects and a summary, which is returned."""
    write_instances(folder / "instances.jsonl", outcome.instances)
    for instance in outcome.instances:
        text = instance.model_dump_json(by_alias=True, indent=1)
        atomic_write(folder / "instances" / f"{instance.instance_id}.json", text.encode())
    atomic_write(folder / "rejects.json", json.dumps(outcome.rejects, indent=1).encode())
    summary = {
        "num_instances": len(outcome.instances),
        "num_rejected": len(outcome.rejects),
        "kinds": dict(Counter(i.provenance.get("kind", "") for i in outcome.instances)),
        "validations": [found.record() for found in outcome.validations],
        "disk_bytes": store.disk_use(),
    }
    atomic_write(folder / "summary.json", json.dumps(summary, indent=1).encode())
    return summary


def as_rows(instances: Iterable[Instance]) -> list[dict[str, Any]]:
    """A pairs file's rows of built instances: enough to build them again, nothing of the sources.

    Raises:
        M1Error: An instance was not built from releases.
    """
    rows = []
    for instance in instances:
        provenance = dict(instance.provenance)
        if provenance.get("kind") not in ("releases", "mutation"):
            raise M1Error(f"{instance.instance_id} was not built from releases, so it has no row")
        rows.append(
            {
                **provenance,
                "instance_id": instance.instance_id,
                "license": instance.license,
                "fail_to_pass": list(instance.fail_to_pass),
                "pass_to_pass": len(instance.pass_to_pass),
            }
        )
    return rows


def is_reachable(index: PackageIndex, package: str) -> bool:
    """Whether the index answers for a package."""
    try:
        index.versions(package)
    except IndexUnreachable:
        return False
    except ReleaseError:
        return True
    return True
