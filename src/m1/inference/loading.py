"""A model on disk, ready to be sampled from: its architecture, weights and tokenizer."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from m1.config.schema import ModelConfig, ParallelConfig, Recipe
from m1.inference.limits import EngineLimits
from m1.inference.parameters import Lightning, read_parameters
from m1.inference.weights import apply, stage
from m1.model.build import build_model
from m1.model.hf.folders import CONFIG, read_config
from m1.model.hf.module import without_aux_loss
from m1.model.parallel import initialize
from m1.model.saving import MARKER
from m1.model.weight_reader import stored_vocab_size
from m1.types import M1Error

CPU_CACHE_BYTES = 2 << 30
GPU_SHARE = 0.85
"""Of the memory that the weights leave free."""


@dataclass(frozen=True)
class Served:
    """A loaded model."""

    model: torch.nn.Module
    config: ModelConfig
    tokenizer_folder: Path


def load_served(
    source: Path,
    *,
    recipe: Recipe | None = None,
    tokenizer: Path | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
    parallel: ParallelConfig | None = None,
) -> Served:
    """Build a model and read its weights.

    Args:
        source: A Hugging Face folder; or a checkpoint, or the folder that holds it.
        recipe: With the [model] that made the checkpoint; not needed where `m1 convert` made it.
        tokenizer: Folder with the tokenizer; absent: the source, or `hf` beside the checkpoint.
        precision: Arithmetic; absent: bf16 on a GPU, fp32 on a CPU.
        parallel: Layout over the ranks that call this together.

    Raises:
        M1Error: Something is missing or does not fit.
    """
    config = _architecture(source, recipe)
    precision = precision or ("bf16" if torch.cuda.is_available() else "fp32")
    config = config.model_copy(update={"precision": precision})
    initialize(parallel)
    assert config.vocab_size is not None
    with torch.random.fork_rng(devices=[]):
        model = build_model(config, vocab_size=config.vocab_size, seed=1, parallel=parallel)
    apply(stage(str(source), model), model)
    folders = [tokenizer] if tokenizer else [source, source / "hf", source.parent / "hf"]
    found = next((f for f in folders if f and (f / "tokenizer.json").is_file()), None)
    if found is None:
        raise M1Error(
            f"there is no tokenizer.json in {', '.join(map(str, folders))}; name its folder with "
            "--tokenizer"
        )
    return Served(model.eval(), config, found)


def _architecture(source: Path, recipe: Recipe | None) -> ModelConfig:
    if (source / CONFIG).is_file():
        return _hf_model(source)
    for path in (source, source / "checkpoint"):
        if not (path / MARKER).is_file():
            continue
        beside = path.parent / "model.toml"
        if recipe is not None:
            config = recipe.model
        elif beside.is_file():
            table = tomllib.loads(beside.read_text(encoding="utf-8"))["model"]
            config = ModelConfig.model_validate(table)
        else:
            raise M1Error(
                f"the architecture of checkpoint {path} is not known; name the recipe whose "
                "[model] made it with --recipe"
            )
        return config.model_copy(update={"vocab_size": stored_vocab_size(path)})
    raise M1Error(
        f"{source} is neither a Hugging Face folder (no {CONFIG}) nor a checkpoint (no {MARKER}); "
        "name one of the two"
    )


def limits_for(
    model: torch.nn.Module,
    *,
    max_sequences: int,
    max_position: int,
    page_size: int,
    cache_bytes: int | None = None,
    step_tokens: int = 8192,
    prefix_bytes: int = 0,
    is_invariant: bool = False,
    record_experts: bool = False,
) -> EngineLimits:
    """Sizes of an engine that fits this machine.

    Args:
        model: The model.
        max_sequences: Sequences in memory.
        max_position: Longest of them.
        page_size: Tokens of a page.
        cache_bytes: For keys and values; absent: what they can all use, within 2 GiB on a CPU and
            85% of the free memory on a GPU.
        step_tokens: Tokens of a model call.
        prefix_bytes: States kept of earlier turns.
        is_invariant: Batch-invariant mode.
        record_experts: Whether experts are kept; they count as keys and values do.
    """
    found = read_parameters(model)
    config = found.config
    num_softmax = sum(not isinstance(x.attention, Lightning) for x in found.layers)
    ranks = found.tensor_group.size() if found.tensor_group else 1
    row = 2 * config.num_query_groups // ranks * config.kv_channels * found.embedding.element_size()
    experts = 2 * len(found.layers) * found.top_k if record_experts else 0
    page = max(1, (num_softmax * row + experts) * page_size)
    if cache_bytes is None:
        cache_bytes = CPU_CACHE_BYTES
        if torch.cuda.is_available():
            heads, dim = config.num_attention_heads // ranks, config.kv_channels
            states = (len(found.layers) - num_softmax) * max_sequences * heads * dim * dim * 4
            cache_bytes = max(0, int(torch.cuda.mem_get_info()[0] * GPU_SHARE) - states)
    wanted = max_sequences * -(-max_position // page_size)
    pages = min(wanted, cache_bytes // page)
    if pages < -(-max_position // page_size):
        raise M1Error(
            f"{cache_bytes} bytes hold {pages * page_size} tokens, fewer than one sequence of "
            f"{max_position}; give more memory, or serve a shorter max_position"
        )
    return EngineLimits(
        num_slots=max_sequences,
        num_pages=pages,
        page_size=page_size,
        step_tokens=step_tokens,
        prefix_bytes=prefix_bytes,
        is_invariant=is_invariant,
        record_experts=record_experts,
    )


def _hf_model(folder: Path) -> ModelConfig:
    return without_aux_loss(read_config(folder).model)
