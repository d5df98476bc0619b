"""Reading of Hugging Face checkpoints, one tensor or piece of one at a time.

safetensors files are read as what they are: eight bytes with the header's length, a JSON header,
the tensors' bytes. Reading ranges of a file, instead of mapping it, keeps memory at one tensor.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m1.config.schema import ModelConfig
from m1.model.hf.layouts import EMBEDDING, HEAD, Shape, tensor_shapes
from m1.types import M1Error

if TYPE_CHECKING:
    import torch

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_CHUNK_BYTES = 4 << 20
_SKIPPED = re.compile(r".*\.(slope_rate|query_decay|key_decay|diagonal_decay|rotary_emb\.inv_freq)")
"""Buffers that a model computes from its configuration."""
_FUSED = re.compile(r"(model\.layers\.\d+)\.mlp\.(gate\.weight|experts\.(gate_up|down)_proj)")
"""How transformers' `minimax` model names a mixture in memory, and may save it."""


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie, row-major and contiguous."""

    path: Path
    start: int
    num_bytes: int
    dtype: str
    """As safetensors names it, such as BF16."""
    shape: Shape

    def part(self, index: int, count: int) -> "Place":
        """The `index`-th of `count` equal parts along the first axis, which they divide."""
        size = self.num_bytes // count
        shape = (self.shape[0] // count, *self.shape[1:])
        return Place(self.path, self.start + index * size, size, self.dtype, shape)

    def entry(self, index: int) -> "Place":
        """Entry `index` of the first axis, without that axis."""
        part = self.part(index, self.shape[0])
        return Place(part.path, part.start, part.num_bytes, part.dtype, part.shape[1:])


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file with an object; M1Error where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise M1Error(
            f"{path} does not exist, so {path.parent} is not a Hugging Face model; name the folder "
            "that holds config.json and the safetensors files"
        ) from None
    except ValueError as error:
        raise M1Error(f"{path} is not JSON ({error}); fetch or save the model again") from None
    if not isinstance(content, dict):
        raise M1Error(f"{path} holds no JSON object; fetch or save the model again")
    return content


def open_tensors(folder: Path) -> dict[str, Place]:
    """Every tensor in the safetensors files of `folder`, from their headers alone.

    Raises:
        M1Error: There are no such files, or some are missing, cut short or not as the index says;
            everything found is named.
    """
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise M1Error(
                f"{folder} has neither {INDEX} nor {SINGLE}; name a folder with both config.json "
                "and safetensors weights (other formats: save them with transformers first)"
            )
        return read_header(folder / SINGLE)
    weight_map: dict[str, str] = read_json(index).get("weight_map", {})
    files = {name: folder / name for name in sorted(set(weight_map.values()))}
    absent = [name for name, path in files.items() if not path.exists()]
    if absent:
        raise M1Error(
            f"{index} names files that are not there: {', '.join(absent)}; fetch them, or resume "
            "the conversion that was writing them"
        )
    headers = {name: read_header(path) for name, path in files.items()}
    lacking = [f"{key} in {name}" for key, name in weight_map.items() if key not in headers[name]]
    if lacking:
        raise M1Error(
            f"{index} names tensors that their files lack: {', '.join(lacking)}; fetch or save the "
            "model again"
        )
    return {key: headers[name][key] for key, name in weight_map.items()}


def read_header(path: Path) -> dict[str, Place]:
    """Tensors of one safetensors file.

    Raises:
        M1Error: The file is cut short or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > size:
            raise M1Error(f"{path} is cut short or no safetensors file; fetch or save it again")
        try:
            header = json.loads(file.read(start - 8))
        except ValueError:
            raise M1Error(f"{path} is no safetensors file; fetch or save it again") from None
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        places[name] = Place(path, start + begin, end - begin, entry["dtype"], (*entry["shape"],))
    expected = max((place.start + place.num_bytes for place in places.values()), default=start)
    if expected != size:
        raise M1Error(
            f"{path} has {size} bytes, but its header describes {expected}; fetch or save it again"
        )
    return places


def match_tensors(places: Mapping[str, Place], config: ModelConfig) -> dict[str, Place]:
    """Find every tensor of a model, in the order of `tensor_shapes`.

    Buffers are skipped, fused experts are taken apart, and the head of a tied model may be a copy
    of its embedding.

    Raises:
        M1Error: Lists every tensor that is unknown, missing or of another shape.
    """
    shapes = tensor_shapes(config)
    found: dict[str, Place] = {}
    for name, place in places.items():
        if not _SKIPPED.fullmatch(name):
            found |= _unfused(name, place)
    if config.tie_embeddings and HEAD in found and EMBEDDING in found:
        _require_equal(found.pop(HEAD), found[EMBEDDING])
    mistakes = [f"missing: {name}" for name in shapes if name not in found]
    mistakes += [f"unknown: {name}" for name in found if name not in shapes]
    mistakes += [
        f"{name} has shape {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in found and found[name].shape != shape
    ]
    if mistakes:
        folder = next(iter(places.values())).path.parent if places else "the checkpoint"
        raise M1Error(
            f"the tensors in {folder} are not those that its config.json describes:\n  "
            + "\n  ".join(mistakes)
            + "\nNothing was converted; mend config.json or fetch the right weights"
        )
    return {name: found[name] for name in shapes}


def _unfused(name: str, place: Place) -> dict[str, Place]:
    match = _FUSED.fullmatch(name)
    if match is None:
        return {name: place}
    moe = f"{match[1]}.block_sparse_moe"
    if match[3] is None:
        return {f"{moe}.gate.weight": place}
    if len(place.shape) != 3 or 0 in place.shape:
        return {name: place}
    found = {}
    for expert in range(place.shape[0]):
        weights = place.entry(expert)
        if match[3] == "down":
            found[f"{moe}.experts.{expert}.w2.weight"] = weights
        else:
            found[f"{moe}.experts.{expert}.w1.weight"] = weights.part(0, 2)
            found[f"{moe}.experts.{expert}.w3.weight"] = weights.part(1, 2)
    return found


def _require_equal(head: Place, embedding: Place) -> None:
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if not same or any(a != b for a, b in zip(chunks(head), chunks(embedding), strict=True)):
        raise M1Error(
            f"config.json says tie_word_embeddings, but {HEAD} in {head.path} differs from "
            f"{EMBEDDING}; set tie_word_embeddings to false, or remove the tensor"
        )


def chunks(place: Place) -> Iterator[bytes]:
    """The bytes of a tensor, in pieces of a bounded size."""
    for piece in _pieces(place, bytearray(min(place.num_bytes, _CHUNK_BYTES))):
        yield bytes(piece)


def _pieces(place: Place, buffer: bytearray) -> Iterator[memoryview]:
    """The bytes of a tensor, each piece in the same buffer."""
    left = place.num_bytes
    with place.path.open("rb", buffering=0) as file:
        file.seek(place.start)
        while left:
            piece = memoryview(buffer)[: min(left, len(buffer))]
            if file.readinto(piece) != len(piece):
                raise M1Error(f"{place.path} was cut short while it was read; fetch it again")
            left -= len(piece)
            yield piece


def torch_dtypes() -> dict[str, "torch.dtype"]:
    """Dtypes that a model is loaded from, by safetensors' names: all fit into float32 exactly."""
    import torch

    return {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read_into(target: "torch.Tensor", place: Place) -> None:
    """Fill a CPU tensor, or a view of one, and convert to its dtype, a bounded piece at a time.

    Args:
        target: As many elements as the place has, in the same order; it may consist of slabs that
            lie apart.
        place: Tensor of a dtype that torch_dtypes names.
    """
    import torch

    if not target.is_contiguous():
        for index, slab in enumerate(target):
            read_into(slab, place.part(index, target.shape[0]))
        return
    flat, done = target.view(-1), 0
    buffer = bytearray(min(place.num_bytes, _CHUNK_BYTES))
    for piece in _pieces(place, buffer):
        values = torch.frombuffer(piece, dtype=torch_dtypes()[place.dtype])
        flat[done : done + values.numel()] = values
        done += values.numel()


def require_loadable(places: Iterable[Place]) -> None:
    """Raise unless every tensor's dtype fits into float32 exactly."""
    strange = sorted({place.dtype for place in places} - torch_dtypes().keys())
    if strange:
        raise M1Error(
            f"the weights have dtypes {', '.join(strange)}, but only F32, BF16 and F16 can be "
            "loaded; save the model in one of these first"
        )
