"""Between Hugging Face folders and our checkpoints, one parameter at a time.

A model from elsewhere becomes

    TARGET/checkpoint/    its weights, as a training stage leaves them, in the dtypes they had
    TARGET/model.toml     its [model] table, for a recipe
    TARGET/hf/            its config.json and tokenizer, for the way back
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch

from m1.config.schema import ModelConfig
from m1.model import saving
from m1.model.hf import writing
from m1.model.hf.export import require_representable, write_config
from m1.model.hf.folders import (
    CONFIG,
    converted_config,
    open_folder,
    read_config,
    write_beside,
)
from m1.model.hf.layouts import Layout, hf_views, tensor_shapes, views_of
from m1.model.hf.reading import read_into, require_loadable, torch_dtypes
from m1.model.journal import Bytes
from m1.model.parallel import initialize
from m1.model.weight_parts import skeleton
from m1.model.weight_reader import WeightReader, stored_vocab_size
from m1.model.weight_writer import write_weights
from m1.storage import atomic_write
from m1.types import M1Error

_BESIDE = "hf"


def from_hf(
    source: Path, target: Path, *, companions: Path | None = None, max_bytes: int
) -> ModelConfig:
    """Write a Hugging Face model as a checkpoint below `target`.

    Returns:
        Its architecture.

    Raises:
        M1Error: The source does not fit its configuration, or the target holds something else.
    """
    saving.require_absent(target / "checkpoint")
    folder = open_folder(source)
    require_loadable(folder.places.values())
    config = folder.config.model
    initialize()
    model = skeleton(config)
    known = torch_dtypes()
    names = {
        name: list(views_of(name, parameter, config) or ())
        for name, parameter in model.named_parameters()
    }
    dtypes = {
        name: reduce(torch.promote_types, [known[folder.places[part].dtype] for part in parts])
        for name, parts in names.items()
    }

    def fill(name: str, tensor: torch.Tensor) -> None:
        for part, view in (views_of(name, tensor, config) or {}).items():
            read_into(view, folder.places[part])

    write_beside(target / _BESIDE, folder.config.raw, companions or source)
    atomic_write(target / "model.toml", model_toml(config).encode())
    write_weights(
        target / "checkpoint",
        model,
        dtypes=dtypes,
        fill=fill,
        origin=folder.identity,
        max_bytes=max_bytes,
    )
    return config


def to_hf(
    source: Path,
    target: Path,
    *,
    layout: Layout | None,
    model: ModelConfig | None,
    companions: Path | None = None,
    max_shard_bytes: int,
) -> Layout:
    """Write a checkpoint as a Hugging Face folder, in the dtypes it is stored in.

    Args:
        source: The checkpoint.
        target: Folder to write.
        layout: Absent: the one it came from, or the first that fits.
        model: Architecture; absent: read from `hf/config.json` beside the checkpoint.
        companions: Folder with tokenizer files; absent: `hf` beside the checkpoint.
        max_shard_bytes: Size at which a new file is begun.

    Returns:
        The layout.

    Raises:
        M1Error: The architecture is not known, does not fit, or the layout cannot express it.
    """
    beside = source.parent / _BESIDE
    known = read_config(beside) if model is None and (beside / CONFIG).exists() else None
    if model is None and known is None:
        raise M1Error(
            f"the architecture of checkpoint {source} is not known; name the recipe whose [model] "
            "made it with --recipe"
        )
    config = known.model if known else model
    assert config is not None
    config = config.model_copy(update={"vocab_size": stored_vocab_size(source)})
    layout = require_representable(config, layout or (known.layout if known else None))
    initialize()
    items = list(_items(source, config))
    if known:
        written = converted_config(known, layout)
    else:
        dtype = str(torch_dtypes()[items[0].dtype]).removeprefix("torch.")
        written = write_config(config, layout, dtype=dtype)
    digest = hashlib.sha256((source / saving.MARKER).read_bytes()).hexdigest()
    origin = f"{digest} {layout}"
    writing.write_weights(target, items, max_bytes=max_shard_bytes, origin=origin)
    write_beside(target, written, companions or (beside if beside.exists() else None))
    return layout


def _items(source: Path, config: ModelConfig) -> Iterator[writing.Item]:
    """Every tensor of a checkpoint; neighbours from one parameter share its reading."""
    model = skeleton(config)
    reader = WeightReader(source, model)
    parameters = dict(model.named_parameters())
    views, shapes = hf_views(parameters, config), tensor_shapes(config)
    owner = {
        part: name
        for name, parameter in parameters.items()
        for part in views_of(name, parameter, config) or ()
    }
    names = {dtype: name for name, dtype in torch_dtypes().items()}
    last: dict[str, Mapping[str, torch.Tensor]] = {}

    def chunks(part: str) -> Iterator[Bytes]:
        name = owner[part]
        if name not in last:
            last.clear()
            last[name] = views_of(name, reader.read(name), config) or {}
        yield last[name][part].contiguous().flatten().view(torch.uint8).numpy().data

    for part, view in views.items():
        dtype = reader.dtypes[owner[part]]
        size = view.numel() * dtype.itemsize
        yield writing.Item(part, names[dtype], shapes[part], size, partial(chunks, part))


def model_toml(config: ModelConfig) -> str:
    """The [model] table of a recipe, without values that are the default."""
    values = config.model_dump(mode="json", exclude_defaults=True)
    return "\n".join(_table("model", values))


def _table(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    if plain:
        yield f"[{name}]"
        yield from (f"{key} = {json.dumps(value)}" for key, value in plain.items())
        yield ""
    for key in (key for key in values if key not in plain):
        yield from _table(f"{name}.{key}", values[key])
