"""A model from a Hugging Face folder as a plain module, and back into a folder.

Shapes: B rows, T tokens of a row, V vocabulary.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core import parallel_state

from m1.config.schema import ModelConfig
from m1.model.build import build_model
from m1.model.hf.config import HfConfig
from m1.model.hf.export import require_representable, write_config
from m1.model.hf.folders import converted_config, open_folder, write_beside
from m1.model.hf.layouts import Layout, hf_views, tensor_shapes
from m1.model.hf.reading import Place, read_into, require_loadable, torch_dtypes
from m1.model.hf.writing import SHARD_BYTES, Item, write_weights
from m1.model.journal import Bytes
from m1.model.packing import pack
from m1.model.parallel import initialize
from m1.storage import atomic_write
from m1.types import M1Error


@dataclass(frozen=True)
class Source:
    """What a loaded model came from, so that it can be saved as it was."""

    folder: Path
    config: HfConfig
    dtypes: Mapping[str, str] = field(default_factory=dict)
    """Hugging Face name -> dtype in the file, as safetensors names it."""


class HfModel(torch.nn.Module):
    """A GPTModel behind the usual interface: rows of tokens in, logits out."""

    def __init__(self, gpt: torch.nn.Module, config: ModelConfig, source: Source) -> None:
        super().__init__()
        self.gpt, self.config, self.source = gpt, config, source

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Score every next token.

        Args:
            tokens: int64 [B, T], rows of full length.

        Returns:
            float32 [B, T, V], on the device of `tokens`.
        """
        if tokens.ndim != 2 or tokens.numel() == 0:
            raise M1Error(
                f"tokens has shape {list(tokens.shape)}, but must be [B, T], not empty; reshape it"
            )
        num_rows, length = tokens.shape
        device = next(self.parameters()).device
        packing = pack(torch.full((num_rows,), length, device=device))
        packed = tokens.to(device).reshape(1, -1)
        logits = self.gpt(packed, packing.positions[None], None, packed_seq_params=packing)
        return logits.view(num_rows, length, -1).to(tokens.device, torch.float32)  # type: ignore[no-any-return]


def load_hf(path: Path | str) -> HfModel:
    """Build the model of a Hugging Face folder in float32 and fill it, one tensor at a time.

    Needs no set-up: it joins a process group of one process where there is none. The model is in
    `eval()` mode and has no auxiliary loss. Memory beyond the model is one tensor.

    Args:
        path: Folder with config.json and safetensors in the published MiniMax-Text-01/M1 layout, or
            in that of transformers' `minimax`, `llama` or `qwen2`.

    Raises:
        M1Error: The folder, its configuration or its tensors do not fit; everything is named.
    """
    folder = open_folder(Path(path))
    config, places = folder.config, folder.places
    require_loadable(places.values())
    initialize()
    _require_one_rank()
    with torch.random.fork_rng(devices=[]):
        architecture = without_aux_loss(config.model)
        gpt = build_model(architecture, vocab_size=_vocab_size(architecture), seed=1)
    fill(gpt, config.model, places)
    if torch.cuda.is_available():
        gpt.cuda()
    dtypes = {name: place.dtype for name, place in places.items()}
    return HfModel(gpt, config.model, Source(folder.path, config, dtypes)).eval()


def fill(gpt: torch.nn.Module, config: ModelConfig, places: Mapping[str, Place]) -> None:
    """Read every tensor into its place among the parameters."""
    with torch.no_grad():
        for name, view in hf_views(dict(gpt.named_parameters()), config).items():
            read_into(view, places[name])


def save_hf(
    model: torch.nn.Module,
    path: Path | str,
    *,
    config: ModelConfig | None = None,
    layout: Layout | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    token_ids: Mapping[str, int | None] | None = None,
) -> None:
    """Write a model as a Hugging Face folder; earlier weights in it are replaced.

    A loaded model keeps its layout, config.json, dtypes and tokenizer, so that loading and saving
    changes no bit. Values that were trained since are rounded to those dtypes.

    Args:
        model: From `load_hf`, or a bare GPTModel on one rank.
        path: Folder to write.
        config: Architecture of a bare GPTModel.
        layout: Absent: the loaded one, or the first that fits.
        max_shard_bytes: Size at which a new file is begun.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id` for config.json.

    Raises:
        M1Error: The layout cannot express the model (every reason is named), or the disk is full.
    """
    source = model.source if isinstance(model, HfModel) else None
    gpt = model.gpt if isinstance(model, HfModel) else model
    config = source.config.model if source else config
    if config is None:
        raise M1Error(
            "save_hf was given a bare model, whose architecture it cannot know; pass config, the "
            "[model] it was built from"
        )
    parameters = dict(gpt.named_parameters())
    vocab_size = parameters["embedding.word_embeddings.weight"].shape[0]
    config = config.model_copy(update={"vocab_size": vocab_size})
    if layout is None and source:
        layout = source.config.layout
    layout = require_representable(config, layout)
    items = list(_items(parameters, config, source.dtypes if source else {}))
    if source:
        written = converted_config(source.config, layout) | dict(token_ids or {})
    else:
        dtype = str(torch_dtypes()[items[0].dtype]).removeprefix("torch.")
        written = write_config(config, layout, dtype=dtype, token_ids=token_ids)
    write_weights(Path(path), items, max_bytes=max_shard_bytes)
    write_beside(Path(path), written, source.folder if source else None)


def export_hf(
    model: torch.nn.Module,
    config: ModelConfig,
    folder: Path,
    *,
    eos_token_id: int,
    pad_token_id: int,
) -> None:
    """Write a trained model for inference: `save_hf` and a generation_config.json.

    Raises:
        M1Error: No layout can express this architecture; every reason is named.
    """
    tokens = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    save_hf(model, folder, config=config, token_ids=tokens)
    generation = {**tokens, "do_sample": True, "temperature": 1.0, "top_p": 0.95}
    text = json.dumps(generation, indent=2) + "\n"
    atomic_write(folder / "generation_config.json", text.encode())


def _items(
    parameters: Mapping[str, torch.Tensor], config: ModelConfig, dtypes: Mapping[str, str]
) -> Iterator[Item]:
    known = torch_dtypes()
    own = {dtype: name for name, dtype in known.items()}
    views, shapes = hf_views(parameters, config), tensor_shapes(config)
    for name, view in views.items():
        dtype = dtypes.get(name) or own[view.dtype]
        size = view.numel() * known[dtype].itemsize

        def chunks(view: torch.Tensor = view, dtype: torch.dtype = known[dtype]) -> Iterator[Bytes]:
            tensor = view.detach().to("cpu", dtype).contiguous().flatten()
            yield tensor.view(torch.uint8).numpy().data

        yield Item(name, dtype, shapes[name], size, chunks)


def without_aux_loss(config: ModelConfig) -> ModelConfig:
    """The architecture with the router's auxiliary loss off: gradients are the loss's alone."""
    if config.moe is None:
        return config
    moe = config.moe.model_copy(update={"aux_loss_coefficient": 0.0})
    return config.model_copy(update={"moe": moe})


def _vocab_size(config: ModelConfig) -> int:
    assert config.vocab_size is not None
    return config.vocab_size


def _require_one_rank() -> None:
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    expert = parallel_state.get_expert_model_parallel_world_size()
    if tensor * pipeline * expert > 1:
        raise M1Error(
            f"load_hf fills a whole model, but this process has a share of one (tensor {tensor}, "
            f"pipeline {pipeline}, expert {expert}); convert with m1 convert in a process of its "
            "own, then load the checkpoint"
        )
