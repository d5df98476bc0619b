"""Where a stage works and keeps its output, and who may be there."""

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from m1.config.schema import Recipe
from m1.config.stages import stage_hashes
from m1.storage import LocalStorage, Storage, atomic_write, folder_digest, open_storage
from m1.types import M1Error, Pointer

LOCK_TIMEOUT_SECONDS = 60.0
LEASE_TIMEOUT_SECONDS = 90.0
"""Longer than a dead machine's lease lives."""


def pointer_key(stage: str, stage_hash: str) -> str:
    """Where a stage's pointer lies below the run root."""
    return f"stages/{stage}-{stage_hash[:12]}/pointer.json"


def local_root(recipe: Recipe) -> Path:
    """Folder on this machine for runs: the storage root, or the scratch folder beside S3."""
    is_local = isinstance(open_storage(recipe.storage.root), LocalStorage)
    return Path(recipe.storage.root if is_local else recipe.storage.scratch).absolute()


def stage_folder(stage: str, recipe: Recipe) -> Path:
    """The stage's own folder on this machine."""
    return local_root(recipe) / Path(pointer_key(stage, stage_hashes(recipe)[stage])).parent


@contextlib.contextmanager
def alone(stage: str, folder: Path, storage: Storage, key: str) -> Iterator[None]:
    """Keep other processes from running the stage: of this machine, and with S3 of others."""
    holds: list[contextlib.AbstractContextManager[None]] = [
        LocalStorage(folder).hold(".lock", owner="", timeout_seconds=LOCK_TIMEOUT_SECONDS)
    ]
    if not isinstance(storage, LocalStorage):
        lock = f"{key.rpartition('/')[0]}/.lock"
        owner = attempt(folder)
        holds.append(storage.hold(lock, owner=owner, timeout_seconds=LEASE_TIMEOUT_SECONDS))
    with contextlib.ExitStack() as stack:
        for held in holds:
            try:
                stack.enter_context(held)
            except TimeoutError as error:
                raise M1Error(
                    f"stage {stage} is being run by another process ({error}); "
                    "wait for it or stop it"
                ) from None
        yield


def attempt(folder: Path) -> str:
    """Name of the work in a stage's folder; it stays when the stage is resumed there."""
    path = folder / ".attempt"
    if not path.exists():
        atomic_write(path, uuid.uuid4().hex[:12].encode())
    return path.read_text()


def place(folder: Path, storage: Storage) -> str:
    """Key below which a stage keeps its output.

    On S3 every attempt has its own, so that two machines which run one stage never write to one
    place; the pointer, which only one of them can create, says whose output holds.
    """
    key = f"stages/{folder.name}"
    is_local = isinstance(storage, LocalStorage)
    return key if is_local else f"{key}/{attempt(folder)}"


def fetch(pointer: Pointer, *, scratch: Path) -> Path:
    """Local folder with a stage's output, downloaded from S3 if need be, and verified.

    Raises:
        M1Error: A file of the output is missing or differs from what was written.
    """
    if pointer.uri.startswith("s3://"):
        folder = scratch / "downloads" / pointer.digest[:16]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):  # ranks of a machine ask at once
            if not folder.exists():
                root, _, key = pointer.uri.partition("/stages/")
                open_storage(root).download_folder(f"stages/{key}", folder)
    else:
        folder = Path(pointer.uri)
    found = folder_digest(folder) if folder.is_dir() else None
    if found != pointer.digest:
        what = (
            "is missing"
            if found is None
            else f"has digest {found[:12]}, not {pointer.digest[:12]} as written"
        )
        where = str(folder.parent)
        if pointer.uri.startswith("s3://"):
            shutil.rmtree(folder, ignore_errors=True)  # fetched anew if it was damaged here
            name = pointer.uri.rpartition("/stages/")[2].partition("/")[0]
            where = f"{pointer.uri.partition('/stages/')[0]}/stages/{name}"
        raise M1Error(
            f"the output of stage {pointer.stage} at {folder} is corrupt: it {what}. Delete "
            f"{where} to compute that stage again; other stages' results are not touched"
        )
    return folder
