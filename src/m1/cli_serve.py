"""`m1 serve`: a model behind an OpenAI-compatible HTTP interface."""

import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from m1.config.loading import load_recipe
from m1.config.schema import ParallelConfig
from m1.stage import exit_with_launcher

_MIB, _GIB = 1 << 20, 1 << 30
TOKEN_VARIABLE = "M1_SERVE_TOKEN"

Source = Annotated[
    Path, typer.Argument(help="Hugging Face folder; or a checkpoint, or a folder holding it.")
]
Recipes = Annotated[
    list[Path] | None,
    typer.Option("--recipe", metavar="RECIPE", help="Whose [model] made the checkpoint."),
]
TokenizerFolder = Annotated[
    Path | None, typer.Option(help="Folder with the tokenizer, where it is not the source.")
]


class Precision(StrEnum):
    """Arithmetic of the trunk; the head is FP32 at either."""

    FP32 = "fp32"
    BF16 = "bf16"


PrecisionOption = Annotated[
    Precision | None, typer.Option(help="Absent: bf16 on a GPU, fp32 on a CPU.")
]


def serve(
    source: Source,
    port: Annotated[int, typer.Option(help="Port.", min=1, max=65535)] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    recipes: Recipes = None,
    tokenizer: TokenizerFolder = None,
    model_name: Annotated[
        str | None, typer.Option(help="Absent: the name of the source's folder.")
    ] = None,
    precision: PrecisionOption = None,
    tensor: Annotated[int, typer.Option(help="Tensor ranks, started by torchrun.", min=1)] = 1,
    expert: Annotated[int, typer.Option(help="Expert ranks.", min=1)] = 1,
    max_sequences: Annotated[int, typer.Option(help="Decoded together.", min=1)] = 64,
    max_waiting: Annotated[
        int, typer.Option(help="Completions under way beyond which clients get 429.", min=1)
    ] = 1024,
    cache_gib: Annotated[
        float | None, typer.Option(help="For keys and values. Absent: by what is free.")
    ] = None,
    prefix_cache_mib: Annotated[
        int, typer.Option(help="States kept for conversations that go on.", min=0)
    ] = 64,
    page_size: Annotated[int, typer.Option(help="Tokens of a page.", min=1)] = 16,
    step_tokens: Annotated[int, typer.Option(help="Tokens of a model call.", min=1)] = 8192,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="Bits independent of other requests; slower.")
    ] = False,
    record_experts: Annotated[
        bool,
        typer.Option("--record-experts", help="/generate says which experts computed each token."),
    ] = False,
    timeout_seconds: Annotated[float, typer.Option(help="Of a request.", min=0.001)] = 600.0,
    drain_seconds: Annotated[
        int, typer.Option(help="What open requests get after SIGTERM.", min=0)
    ] = 60,
    max_body_mib: Annotated[int, typer.Option(help="Largest request.", min=1)] = 32,
) -> None:
    """Serve a model over HTTP; M1_SERVE_TOKEN, if set, is asked of clients.

    SIGTERM lets open requests finish and takes no new ones.
    """
    warnings.filterwarnings("ignore", module="megatron")  # what it lacks, m1 doctor says
    exit_with_launcher()
    from m1.model import cpu

    cpu.without_compilation()  # before megatron-core is imported
    import uvicorn

    from m1.inference.core import EngineCore
    from m1.inference.loading import limits_for, load_served
    from m1.inference.loop import EngineLoop
    from m1.inference.server.app import ServerLimits, create_app
    from m1.inference.text import TextTokenizer

    served = load_served(
        source,
        recipe=load_recipe(recipes) if recipes else None,
        tokenizer=tokenizer,
        precision=precision.value if precision else None,
        parallel=ParallelConfig(tensor=tensor, expert=expert, data=max(1, expert // tensor)),
    )
    limits = limits_for(
        served.model,
        max_sequences=max_sequences,
        max_position=served.config.max_position,
        page_size=page_size,
        cache_bytes=int(cache_gib * _GIB) if cache_gib is not None else None,
        step_tokens=step_tokens,
        prefix_bytes=prefix_cache_mib * _MIB,
        is_invariant=batch_invariant,
        record_experts=record_experts,
    )
    text = TextTokenizer(served.tokenizer_folder)
    core = EngineCore(served.model, num_tokens=text.vocab_size, limits=limits, tokenizer=text)
    loop = EngineLoop(core, served.model, max_waiting=max_waiting)
    if int(os.environ.get("RANK", "0")) > 0:
        loop.serve_as_follower()
        return
    name = model_name or source.resolve().name
    app = create_app(
        loop,
        text,
        model_name=name,
        limits=ServerLimits(
            token=os.environ.get(TOKEN_VARIABLE) or None,
            timeout_seconds=timeout_seconds,
            max_body_bytes=max_body_mib * _MIB,
        ),
    )
    loop.start()
    Console().print(
        f"serving {name} at http://{host}:{port}: {limits.num_slots} sequences, "
        f"{limits.num_tokens} tokens of keys and values",
        soft_wrap=True,
    )
    # The engine's thread gives the interpreter away at every operation; at the default of 5 ms it
    # would wait as long to get it back whenever the server has work.
    sys.setswitchinterval(5e-4)
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=drain_seconds,
        timeout_keep_alive=75,
    )
    loop.stop()
