"""`m1 convert` and `m1 tokenizer`: other models and their tokenizers for our stages, and back."""

import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from m1.config.loading import load_recipe
from m1.model.hf.convert import convert as convert_model

_GB = 10**9


class Format(StrEnum):
    """What a model can be written as."""

    PUBLISHED = "published"
    MINIMAX = "minimax"
    LLAMA = "llama"
    QWEN2 = "qwen2"
    M1 = "m1"


def convert(
    source: Annotated[
        Path, typer.Argument(help="Hugging Face folder; or a checkpoint, or a folder holding it.")
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[
        Format | None,
        typer.Option(help="Absent: m1 for a Hugging Face folder, for a checkpoint what fits."),
    ] = None,
    recipes: Annotated[
        list[Path] | None,
        typer.Option("--recipe", metavar="RECIPE", help="Whose [model] made the checkpoint."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder with the tokenizer, where it is not the source.")
    ] = None,
    shard_gb: Annotated[float, typer.Option(help="Size of a file in 10^9 bytes.", min=1e-6)] = 5,
) -> None:
    """Convert a model between Hugging Face and here; killed, it goes on when run again."""
    warnings.filterwarnings("ignore", module="megatron")  # what it lacks, m1 doctor says
    written = convert_model(
        source,
        target,
        to=to.value if to else None,
        recipe=load_recipe(recipes) if recipes else None,
        tokenizer=tokenizer,
        max_shard_bytes=int(shard_gb * _GB),
    )
    typer.echo(f"wrote {target} ({written})")


def tokenizer(
    source: Annotated[Path, typer.Argument(help="Folder of a Hugging Face fast tokenizer.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    rename: Annotated[
        list[str] | None,
        typer.Option(metavar="THEIRS=OURS", help="A special token and what it becomes; repeat."),
    ] = None,
) -> None:
    """Give another model's tokenizer the special tokens and the template of our chat format.

    Its own special tokens are renamed, so that the model's embedding stays as it is.
    """
    from m1.data.tokenizer import adopt_tokenizer  # a client of a cluster does without tokenizers

    pairs = [name.partition("=") for name in rename or []]
    if wrong := [theirs for theirs, sign, ours in pairs if not (theirs and sign and ours)]:
        raise typer.BadParameter(f"{' '.join(wrong)} must have the form THEIRS=OURS")
    adopt_tokenizer(source, target, {theirs: ours for theirs, _, ours in pairs})
    typer.echo(f"wrote {target}")
