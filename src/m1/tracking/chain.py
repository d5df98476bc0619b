"""The chain of one output: back to data, config, code and image, and forward to its evaluations.

Pointers hold it (`metadata["lineage"]`), so it can be followed without MLflow; MLflow's models and
registered versions lead to pointers by their tags `checkpoint_uri` and `source_uri`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from m1.config.stages import in_order
from m1.storage import Storage, open_storage, read_pointer
from m1.tracking.store import open_client
from m1.types import M1Error, Pointer

_MODEL_ID = re.compile(r"m-[0-9a-f]{32}")
_STAGE_FOLDER = re.compile(r"^(?P<root>.*?)/?stages/(?P<folder>[\w.]+-[0-9a-f]{12})(/.*)?$")


@dataclass(frozen=True)
class Chain:
    """One output with what it came from and what was made of it."""

    target: Pointer
    back: Mapping[str, Pointer]
    """The outputs it was made of, in order of execution; itself last."""
    forward: Mapping[str, Pointer]
    """By stage and hash: the outputs below the same root that were made of it."""
    versions: tuple[str, ...] = ()
    """Registered versions, as `name v3 (champion)`."""

    @property
    def evaluations(self) -> list[tuple[str, str, Mapping[str, Any]]]:
        """(Stage hash of the evaluation, benchmark, score) for the model of the target's stage."""
        return [
            (pointer.stage_hash, benchmark, row[self.target.stage])
            for pointer in self.forward.values()
            for benchmark, row in pointer.metadata.get("scores", {}).items()
            if self.target.stage in row
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "target": _facts(self.target),
            "back": {stage: _facts(pointer) for stage, pointer in self.back.items()},
            "forward": {name: _facts(pointer) for name, pointer in self.forward.items()},
            "evaluations": [
                {"evaluation": stage_hash, "benchmark": benchmark, **score}
                for stage_hash, benchmark, score in self.evaluations
            ],
            "versions": list(self.versions),
        }


def follow(target: str, *, uri: str) -> Chain:
    """The chain of an output.

    Args:
        target: Address of a stage's output, of a file in it or of its pointer; an MLflow model id
            (`m-...`); or a registered model: `models:/NAME/VERSION`, `models:/NAME@ALIAS`, `NAME`.
        uri: MLflow tracking URI, asked about models.

    Raises:
        M1Error: There is no such thing, or no pointer leads on from it.
    """
    is_address = "stages/" in target
    address = target if is_address else _address_of(target, uri)
    found = _STAGE_FOLDER.match(address)
    if found is None:
        raise M1Error(
            f"{address} is not below a run root's stages/ folder; give the address of a stage's "
            "output, an MLflow model id (m-...) or a registered model (models:/NAME@ALIAS)"
        )
    storage = open_storage(found["root"] or ".")
    pointer = read_pointer(storage, f"stages/{found['folder']}/pointer.json")
    if pointer is None:
        raise M1Error(
            f"there is no pointer at {storage.uri('stages/' + found['folder'])}: the stage is not "
            "finished, or its results were deleted"
        )
    back = _ancestors(pointer, storage)
    return Chain(
        target=pointer,
        back={stage: back[stage] for stage in in_order(back)},
        forward=_descendants(pointer, storage),
        versions=_versions(pointer, uri),
    )


def origins(pointers: Iterable[Pointer]) -> dict[str, tuple[str, ...]]:
    """Distinct code versions and images of some outputs, by `code`, `image` and `container`."""
    found: dict[str, dict[str, None]] = {"code": {}, "image": {}, "container": {}}
    for pointer in pointers:
        for kind, values in found.items():
            value = lineage_of(pointer).get(kind)
            if value:
                values[str(value)] = None
    return {kind: tuple(values) for kind, values in found.items()}


def lineage_of(pointer: Pointer) -> Mapping[str, Any]:
    """What a pointer says of its origin; empty in pointers of earlier versions."""
    found = pointer.metadata.get("lineage")
    return found if isinstance(found, Mapping) else {}


def _facts(pointer: Pointer) -> dict[str, Any]:
    ids = ("mlflow_run_id", "model_id", "model_name", "version")
    return {
        "stage": pointer.stage,
        "stage_hash": pointer.stage_hash,
        "uri": pointer.uri,
        "digest": pointer.digest,
        "step": pointer.step,
        **{key: pointer.metadata[key] for key in ids if pointer.metadata.get(key)},
        **lineage_of(pointer),
    }


def _address_of(target: str, uri: str) -> str:
    """Address of the output behind a model id or a registered model."""
    from mlflow.exceptions import MlflowException

    client = open_client(uri)
    try:
        if _MODEL_ID.fullmatch(target):
            return str(client.get_logged_model(target).tags["checkpoint_uri"])
        tags = _registered(client, target.removeprefix("models:/")).tags
    except MlflowException as error:
        raise M1Error(
            f"MLflow at {uri} has no model {target} ({error.message}); give the address of an "
            "output, a model id (m-...) or models:/NAME@ALIAS"
        ) from error
    model_id = tags.get("model_id")
    if model_id:
        return str(client.get_logged_model(model_id).tags["checkpoint_uri"])
    return str(tags.get("source_uri", ""))


def _registered(client: Any, name: str) -> Any:
    if "@" in name:
        return client.get_model_version_by_alias(*name.split("@", 1))
    if "/" in name:
        return client.get_model_version(*name.split("/", 1))
    found = client.search_model_versions(f"name = '{name}'")
    if not found:
        raise M1Error(f"MLflow has no registered model {name!r}, and no output lies at {name!r}")
    return max(found, key=lambda version: int(version.version))


def _ancestors(pointer: Pointer, storage: Storage) -> dict[str, Pointer]:
    found = {pointer.stage: pointer}
    for stage, given in lineage_of(pointer).get("inputs", {}).items():
        key = f"stages/{stage}-{given['stage_hash'][:12]}/pointer.json"
        parent = read_pointer(storage, key)
        if parent is None:  # deleted, or elsewhere: what was read of it is still known
            parent = Pointer(stage, given["stage_hash"], given["uri"], given["digest"])
        found = _ancestors(parent, storage) | found
    return found


def _descendants(pointer: Pointer, storage: Storage) -> dict[str, Pointer]:
    """By `stage-hash`: outputs that a chain of inputs ties to `pointer`, nearest first."""
    keys = [key for key in storage.list("stages") if key.endswith("/pointer.json")]
    read = [read_pointer(storage, key) for key in keys]
    others = [other for other in read if other is not None]
    reached = {pointer.stage_hash}
    found: dict[str, Pointer] = {}
    while True:
        new = [
            other
            for other in others
            if other.stage_hash not in reached
            and any(
                given.get("stage_hash") in reached
                for given in lineage_of(other).get("inputs", {}).values()
            )
        ]
        if not new:
            return found
        reached |= {other.stage_hash for other in new}
        found |= {f"{other.stage}-{other.stage_hash[:12]}": other for other in new}


def _versions(pointer: Pointer, uri: str) -> tuple[str, ...]:
    model_id = pointer.metadata.get("model_id")
    if not model_id or str(model_id).startswith("pending:"):
        return ()
    try:
        client = open_client(uri)
        found = client.search_model_versions(f"tags.model_id = '{model_id}'")
        # A search leaves the aliases out.
        found = [client.get_model_version(version.name, version.version) for version in found]
    except M1Error:  # the pointers tell the rest
        return ()
    return tuple(
        f"{version.name} v{version.version}"
        + (f" ({', '.join(version.aliases)})" if version.aliases else "")
        for version in found
    )
