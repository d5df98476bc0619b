"""Rows of public sets (SWE-bench, SWE-smith, SWE-rebench) as fields of an `Instance`."""

import json
from collections.abc import Mapping
from typing import Any

from m1.swe.diffs import reverse

_COMMON = (
    "repo",
    "instance_id",
    "base_commit",
    "problem_statement",
    "patch",
    "test_patch",
    "version",
    "created_at",
    "hints_text",
)


def to_instance_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row under our names.

    SWE-smith's `patch` makes the fault, so the gold patch is its reverse, and its faulty tree is
    the branch named after the instance. SWE-bench writes lists of tests as JSON texts.

    Raises:
        ValueError: A list of tests or a patch does not parse, or both test lists are missing.
    """
    if isinstance(row.get("environment"), Mapping):
        return dict(row)
    if "FAIL_TO_PASS" not in row and "fail_to_pass" not in row:
        raise ValueError("FAIL_TO_PASS is missing, but required; is this a set of SWE tasks?")
    fields: dict[str, Any] = {k: row[k] for k in _COMMON if row.get(k) is not None}
    fields = {name: str(value) for name, value in fields.items()}
    fields["FAIL_TO_PASS"] = _tests(row, "FAIL_TO_PASS")
    fields["PASS_TO_PASS"] = _tests(row, "PASS_TO_PASS")
    fields["environment"] = {"image": _image(row)}
    fields["license"] = str(row.get("license_name") or row.get("license") or "")
    kind = _kind(row)
    if kind == "swe-smith":
        fields["patch"] = reverse(str(row["patch"]))
        fields.setdefault("base_commit", str(row["instance_id"]))
        fields.setdefault("problem_statement", "")
    kept = {k: row[k] for k in ("install_config", "meta", "requirements", "strategy") if k in row}
    fields["provenance"] = {"kind": kind, **kept}
    return fields


def _kind(row: Mapping[str, Any]) -> str:
    if "install_config" in row or "license_name" in row:
        return "swe-rebench"
    if "test_patch" not in row and "image_name" in row:
        return "swe-smith"
    return "swe-bench"


def _image(row: Mapping[str, Any]) -> str:
    return str(row.get("image_name") or row.get("docker_image") or "")


def _tests(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = row.get(name, row.get(name.lower()))
    if value is None:
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} is {value[:60]!r}, which is no JSON list: {error}") from None
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} is {type(value).__name__}, but should be a list")
    return tuple(map(str, value))
