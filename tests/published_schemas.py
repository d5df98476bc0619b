"""Custom resources' published schemas, closed to unknown fields; CEL rules are left out.

They lie in folders beside the checkout (`../shared/schemas/crds`, or those that M1_CRDS lists).
"""

import functools
import os
from pathlib import Path

import yaml

SHARED = Path(__file__).parents[2] / "shared" / "schemas" / "crds"
FOLDERS = [Path(name) for name in os.environ.get("M1_CRDS", str(SHARED)).split(os.pathsep)]


@functools.cache
def _definitions():
    found = {}
    for path in (path for folder in FOLDERS for path in folder.glob("*.yaml")):
        group = path.name.partition("_")[0]
        found.setdefault(group, []).append(path)
    return found


@functools.cache
def schema_of(api_version, kind):
    """JSON schema of a kind; None where no folder has it."""
    group, _, version = api_version.partition("/")
    for path in _definitions().get(group, ()):
        spec = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]
        if spec["names"]["kind"] == kind:
            (found,) = [v for v in spec["versions"] if v["name"] == version and v["served"]]
            return _closed(found["schema"]["openAPIV3Schema"])
    return None


def _closed(value):
    if isinstance(value, list):
        return [_closed(item) for item in value]
    if not isinstance(value, dict):
        return value
    closed = {key: _closed(item) for key, item in value.items()}
    if value.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if value.get("x-kubernetes-preserve-unknown-fields"):
        return closed
    if isinstance(value.get("properties"), dict) and value.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed
