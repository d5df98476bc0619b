"""Conversion of whole models between Hugging Face layouts and our checkpoints, streaming.

Between Hugging Face layouts bytes are copied from file to file, without torch; a checkpoint is read
and written parameter by parameter (`m1.model.hf.checkpoints`). A killed conversion goes on when it
is started again.
"""

from functools import partial
from pathlib import Path
from typing import Literal

from m1.config.schema import Recipe
from m1.model.hf.export import require_representable
from m1.model.hf.folders import CONFIG, converted_config, open_folder, write_beside
from m1.model.hf.layouts import Layout
from m1.model.hf.reading import chunks
from m1.model.hf.writing import SHARD_BYTES, Item, write_weights
from m1.types import M1Error

CHECKPOINT_MARKER = "complete.json"


def convert(
    source: Path,
    target: Path,
    *,
    to: Layout | Literal["m1"] | None = None,
    recipe: Recipe | None = None,
    tokenizer: Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> str:
    """Convert a model; which way follows from what `source` is.

    Args:
        source: A Hugging Face folder; or a checkpoint, or the folder that holds it.
        target: Folder to write, new or left by an interrupted conversion.
        to: A layout, or `m1` for a checkpoint. Absent: a checkpoint for a Hugging Face folder, and
            for a checkpoint the layout it came from or the first that fits.
        recipe: With the [model] that made the checkpoint; not needed where `m1 convert` made it.
        tokenizer: Folder to copy tokenizer files from; absent: from beside the source.
        max_shard_bytes: Size at which a new file is begun.

    Returns:
        What was written: a layout, or "m1".

    Raises:
        M1Error: The source cannot be read or expressed so; everything is named.
    """
    if source.resolve() == target.resolve():
        raise M1Error(f"source and target are both {source}; name another target")
    found = _checkpoint_in(source)
    if found is not None and to == "m1":
        raise M1Error(f"{found} is a checkpoint of ours already; name a layout, or copy it")
    layout = None if to == "m1" else to
    if found is None and layout is not None:
        rewrite(source, target, layout, companions=tokenizer, max_shard_bytes=max_shard_bytes)
        return layout
    from m1.model import cpu

    cpu.without_compilation()  # before megatron-core is imported
    from m1.model.hf import checkpoints

    if found is None:
        checkpoints.from_hf(source, target, companions=tokenizer, max_bytes=max_shard_bytes)
        return "m1"
    return checkpoints.to_hf(
        found,
        target,
        layout=layout,
        model=recipe.model if recipe else None,
        companions=tokenizer,
        max_shard_bytes=max_shard_bytes,
    )


def rewrite(
    source: Path,
    target: Path,
    layout: Layout,
    *,
    companions: Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face folder in another layout; every tensor keeps its bits.

    Raises:
        M1Error: The source does not fit its configuration, or the layout cannot express it.
    """
    folder = open_folder(source)
    require_representable(folder.config.model, layout)
    items = [
        Item(name, place.dtype, place.shape, place.num_bytes, partial(chunks, place))
        for name, place in folder.places.items()
    ]
    origin = f"{folder.identity} {layout}"
    write_weights(target, items, max_bytes=max_shard_bytes, origin=origin)
    write_beside(target, converted_config(folder.config, layout), companions or source)


def _checkpoint_in(source: Path) -> Path | None:
    """The checkpoint that `source` is or holds; None for a Hugging Face folder.

    Raises:
        M1Error: It is neither.
    """
    for path in (source, source / "checkpoint"):
        if (path / CHECKPOINT_MARKER).exists():
            return path
    if (source / CONFIG).exists():
        return None
    raise M1Error(
        f"{source} holds neither {CONFIG} (a Hugging Face model) nor {CHECKPOINT_MARKER} (a "
        "checkpoint of ours); name a folder that does"
    )
