"""New weights for a running engine: read whole and checked first, then copied in between two steps.

Where they come from is a uri:

    PATH, file://PATH     a folder of `publish`, a checkpoint of ours, or a Hugging Face folder
    s3://BUCKET/PREFIX    the same on shared storage
    shm://NAME            a folder of `publish` in this host's shared memory
    tcp://HOST:PORT       broadcast by the trainer (`m1.inference.broadcast`)
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from m1.inference.broadcast import receive
from m1.model.hf.folders import CONFIG, open_folder
from m1.model.hf.layouts import views_of
from m1.model.hf.reading import read_into
from m1.model.saving import MARKER
from m1.model.weight_reader import WeightReader
from m1.storage import disk_errors, open_storage
from m1.types import M1Error

MANIFEST = "weights.json"
_SHARED_MEMORY = Path("/dev/shm")


def publish(model: torch.nn.Module, uri: str, *, version: int) -> None:
    """Write a model's weights for engines with the same layout to load.

    The folder appears when it is whole, in place of what was there. Several ranks write one file
    each and call it together.

    Args:
        model: The trainer's; its parameters, in the dtypes they have.
        uri: `PATH`, `file://PATH` or `shm://NAME`.
        version: Of the policy.
    """
    folder = _local_folder(uri)
    partial = folder.with_name(f".{folder.name}.partial")
    rank, world = _rank_and_world()
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        with disk_errors(folder.parent):
            partial.mkdir(parents=True)
    _barrier()
    path = partial / _file_name(rank, world)
    tensors = {
        name: parameter.detach().to("cpu").contiguous().clone()
        for name, parameter in model.named_parameters()
    }
    with disk_errors(folder.parent):
        save_file(tensors, path)
    digest = {"sha256": _sha256(path), "bytes": path.stat().st_size}
    digests: list[Any] = [None] * world
    if world > 1:
        dist.all_gather_object(digests, digest)
    else:
        digests = [digest]
    if rank == 0:
        files = {_file_name(r, world): found for r, found in enumerate(digests)}
        manifest = {"version": version, "files": files}
        with disk_errors(folder.parent):
            (partial / MANIFEST).write_text(json.dumps(manifest))
            _replace(partial, folder)
    _barrier()


def unpublish(uri: str) -> None:
    """Remove what `publish` wrote."""
    shutil.rmtree(_local_folder(uri), ignore_errors=True)


def stage(uri: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Read and check new weights without touching the old.

    Args:
        uri: See the module.
        model: Whose parameters they are to replace.

    Returns:
        A tensor for every parameter, by name.

    Raises:
        M1Error: They are missing, torn, corrupt, or another model's; the model is as it was.
    """
    if uri.startswith("tcp://"):
        staged = receive(uri, model)
    elif uri.startswith("s3://"):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "weights"
            open_storage(f"s3://{bucket}").download_folder(prefix.strip("/"), local)
            staged = _read_folder(local, uri, model)
    else:
        staged = _read_folder(_local_folder(uri), uri, model)
    _require_same(staged, model, uri)
    return staged


@torch.no_grad()
def apply(staged: Mapping[str, torch.Tensor], model: torch.nn.Module) -> None:
    """Copy staged weights into the model."""
    for name, parameter in model.named_parameters():
        parameter.copy_(staged[name], non_blocking=True)


def _read_folder(folder: Path, uri: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    if (folder / MANIFEST).is_file():
        return _read_published(folder)
    for path in (folder, folder / "checkpoint"):
        if (path / MARKER).is_file():
            reader = WeightReader(path, model)
            return {name: reader.read(name).clone() for name, _ in model.named_parameters()}
    if (folder / CONFIG).is_file():
        return _read_hf(folder, model)
    raise M1Error(
        f"{uri} has neither {MANIFEST} (m1.inference.weights.publish) nor {MARKER} (a checkpoint) "
        f"nor {CONFIG} (a Hugging Face folder); name a folder of weights"
    )


def _read_published(folder: Path) -> dict[str, torch.Tensor]:
    rank, world = _rank_and_world()
    name = _file_name(rank, world)
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        expected = files[name]["sha256"]
    except (ValueError, KeyError) as error:
        raise M1Error(
            f"{folder / MANIFEST} does not describe {name} ({error}); publish the weights again, "
            f"from {world} ranks"
        ) from error
    path = folder / name
    if not path.is_file() or _sha256(path) != expected:
        what = "is not what was written" if path.is_file() else "is missing"
        raise M1Error(f"{path} {what}; the weights stay as they are. Publish them again")
    try:
        loaded: dict[str, torch.Tensor] = load_file(path)
        return loaded
    except SafetensorError as error:
        raise M1Error(f"{path} cannot be read ({error}); publish the weights again") from error


def _read_hf(folder: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    if _rank_and_world()[1] > 1:
        raise M1Error(
            f"{folder} is a Hugging Face folder, which is read on one rank only; convert it with "
            "`m1 convert` first: a checkpoint is read under any layout"
        )
    found = open_folder(folder)
    staged = {}
    for name, parameter in model.named_parameters():
        tensor = torch.empty(parameter.shape, dtype=parameter.dtype)
        for part, view in (views_of(name, tensor, found.config.model) or {}).items():
            if part not in found.places or found.places[part].num_bytes == 0:
                raise M1Error(f"{folder} has no {part}; it is another model's")
            if view.numel() != _num_elements(found.places[part].shape):
                raise M1Error(f"{part} in {folder} has another shape; it is another model's")
            read_into(view, found.places[part])
        staged[name] = tensor
    return staged


def _num_elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _require_same(staged: Mapping[str, torch.Tensor], model: torch.nn.Module, uri: str) -> None:
    own = dict(model.named_parameters())
    wrong = [f"{name} is missing" for name in own if name not in staged]
    wrong += [f"{name} is not in the model" for name in staged if name not in own]
    wrong += [
        f"{name} has shape {list(staged[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in staged and staged[name].shape != own[name].shape
    ]
    if wrong:
        raise M1Error(
            f"the weights at {uri} are another model's: {'; '.join(wrong[:5])}"
            + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            + ". The weights stay as they are"
        )


def _local_folder(uri: str) -> Path:
    if uri.startswith("shm://"):
        name = uri.removeprefix("shm://")
        if not name or "/" in name or name.startswith("."):
            raise M1Error(f"{uri} names no shared memory; write shm://NAME without slashes")
        if not _SHARED_MEMORY.is_dir():
            raise M1Error(f"{uri} needs {_SHARED_MEMORY}, which this machine lacks; name a folder")
        return _SHARED_MEMORY / f"m1-{name}"
    return Path(os.path.abspath(uri.removeprefix("file://")))


def _replace(partial: Path, folder: Path) -> None:
    """Put a folder in another's place; a reader meets one, the other, or a wrong digest."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _file_name(rank: int, world: int) -> str:
    return f"rank{rank}of{world}.safetensors"


def _rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
