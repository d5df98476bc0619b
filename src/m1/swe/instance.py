"""One task: a repository with a fault, the tests that show it, and the patch that mends it.

The fields are SWE-bench's (Jimenez et al., 2024), with licence, provenance and environment added.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from m1.storage import atomic_write
from m1.types import M1Error


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Environment(_Record):
    """What the tests run in; paths are relative to the store that built it."""

    tree: str = ""
    """Folder with the faulty tree, below `trees/`; empty: only an image is known."""
    site: str = ""
    """Folder with the installed dependencies, below `sites/`."""
    tests: str = ""
    """Folder with the test files of grading, below `tests/`; agents never see it."""
    image: str = ""
    """OCI image that holds the same, where there is one."""
    python_path: tuple[str, ...] = (".",)
    """Folders of the tree that are importable."""
    test_files: tuple[str, ...] = ()
    """Files that hold the tests of both lists."""
    plugins: tuple[str, ...] = ()
    """pytest plugins that the tests need, by module; no other is loaded."""
    clock: float | None = 1_700_000_000.0
    """Unix time at which the tests' clock starts; None leaves the real one."""
    allowed_changes: tuple[str, ...] = ()
    """What would be signs of tampering, but the package does it itself, before or after gold."""
    unproven: tuple[str, ...] = ()
    """Tests that pass on gold without reaching their own last line; see `m1.swe.proofs`."""


class Instance(_Record):
    """A task in SWE-bench's fields."""

    repo: str
    """`owner/name`, or `pypi/name` for a package."""
    instance_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")
    base_commit: str
    """Commit of the faulty tree; for a package, that of the tree imported as one commit."""
    problem_statement: str
    patch: str
    """Unified diff that mends the fault: the gold solution."""
    test_patch: str = ""
    """Unified diff from the tests in the tree to those of grading; empty where none change."""
    fail_to_pass: tuple[str, ...] = Field(alias="FAIL_TO_PASS")
    """pytest node ids that fail before the gold patch and pass after it."""
    pass_to_pass: tuple[str, ...] = Field(alias="PASS_TO_PASS")
    """pytest node ids that pass before and after."""
    version: str = ""
    created_at: str = ""
    hints_text: str = ""
    license: str = ""
    provenance: dict[str, Any] = Field(default_factory=dict)
    """Where it comes from: kind, package, versions, files with sha256, or the row's source."""
    environment: Environment = Environment()

    @property
    def is_runnable(self) -> bool:
        """Whether this machine's store can hold it; rows of public sets name images only."""
        return bool(self.environment.tree)


def write_instances(path: Path, instances: Iterable[Instance]) -> None:
    """One JSON object a line, under SWE-bench's names."""
    lines = [instance.model_dump_json(by_alias=True) + "\n" for instance in instances]
    atomic_write(path, "".join(lines).encode())


def read_instances(path: Path) -> list[Instance]:
    """Read JSONL, a JSON array or one object, of ours, SWE-bench, SWE-smith or SWE-rebench.

    Raises:
        M1Error: A row is none of them; names the line and what is wrong with it.
    """
    return [_parse(row, f"{path}, row {number}") for number, row in enumerate(_rows(path), start=1)]


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise M1Error(f"{path} cannot be read: {error.strerror}; check the path") from None
    try:
        try:
            whole = json.loads(text)
        except json.JSONDecodeError:
            whole = None  # several lines, each an object
        if whole is not None:
            yield from whole if isinstance(whole, list) else [whole]
            return
        for line in text.splitlines():
            if line.strip():
                yield json.loads(line)
    except json.JSONDecodeError as error:
        raise M1Error(f"{path} is neither JSONL nor a JSON array: {error}; mend it") from None


def _parse(row: Mapping[str, Any], where: str) -> Instance:
    from m1.swe.layouts import to_instance_fields

    if not isinstance(row, Mapping):
        raise M1Error(f"{where} is {type(row).__name__}, but should be an object; mend it")
    try:
        return Instance.model_validate(to_instance_fields(row))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise M1Error(f"{where}: {field}: {first['msg']}; mend the row") from None
    except (KeyError, ValueError) as error:
        raise M1Error(f"{where}: {error}; mend the row") from None
