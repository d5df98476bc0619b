"""Hugging Face folders as a whole: configuration, weights, and what lies beside them."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1.model.hf.config import HfConfig, parse_config
from m1.model.hf.export import TOKEN_KEYS, write_config
from m1.model.hf.layouts import Layout
from m1.model.hf.reading import Place, match_tensors, open_tensors, read_json
from m1.storage import atomic_write, disk_errors

CONFIG = "config.json"
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
_CODE = ("configuration_*.py", "modeling_*.py")
"""What `auto_map` in a published config.json refers to."""


@dataclass(frozen=True)
class HfFolder:
    """A Hugging Face model on disk whose tensors are those of its configuration."""

    path: Path
    config: HfConfig
    places: Mapping[str, Place]
    """Every tensor, in the order of `tensor_shapes`."""

    @property
    def identity(self) -> str:
        """Digest that changes with the configuration and with any file's size or time."""
        files = sorted({place.path for place in self.places.values()})
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        known = [self.config.raw, stats, [str(place) for place in self.places.values()]]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def read_config(folder: Path) -> HfConfig:
    """The configuration in a folder.

    Raises:
        M1Error: There is none, or it describes a model that does not exist here.
    """
    return parse_config(read_json(folder / CONFIG), folder / CONFIG)


def open_folder(folder: Path) -> HfFolder:
    """Look into a folder without reading weights.

    Raises:
        M1Error: The folder, its configuration or its tensors do not fit; everything is named.
    """
    config = read_config(folder)
    return HfFolder(folder, config, match_tensors(open_tensors(folder), config.model))


def converted_config(config: HfConfig, layout: Layout) -> dict[str, Any]:
    """The config.json of a model in another layout; as it was where the layout is the same."""
    if layout == config.layout:
        return dict(config.raw)
    dtype = config.raw.get("dtype") or config.raw.get("torch_dtype") or "float32"
    tokens = {key: config.raw.get(key) for key in TOKEN_KEYS}
    return write_config(config.model, layout, dtype=dtype, token_ids=tokens)


def write_beside(folder: Path, config: Mapping[str, Any], companions: Path | None) -> None:
    """Write config.json and copy the tokenizer, its templates and the generation defaults.

    The code that a config.json refers to is copied with it.

    Args:
        folder: Is created.
        config: Content of config.json.
        companions: Folder to copy from.
    """
    text = json.dumps(config, indent=2) + "\n"
    atomic_write(folder / CONFIG, text.encode())
    if companions is None:
        return
    for pattern in (*_COMPANIONS, *(_CODE if "auto_map" in config else ())):
        for path in companions.glob(pattern):
            if path.is_file() and path.resolve() != (folder / path.name).resolve():
                with disk_errors(folder):
                    shutil.copyfile(path, folder / path.name)
