"""Small Hugging Face folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from m1.model.hf.config import parse_config
from m1.model.hf.layouts import tensor_shapes

Folder = Callable[..., Path]

MINIMAX = {
    "model_type": "minimax",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "eos_token_id": 5,
    "dtype": "bfloat16",
}


def random_tensors(raw: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors that a config.json describes."""
    generator = torch.Generator().manual_seed(0)
    shapes = tensor_shapes(parse_config(raw, Path("config.json")).model)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }


@pytest.fixture
def hf_folder(tmp_path: Path) -> Folder:
    """Write a folder as others do: several files, not in the order of layers, with an index."""

    def make(
        name: str = "source",
        *,
        changes: dict[str, Any] | None = None,
        tensors: dict[str, torch.Tensor] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        num_files: int = 3,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        raw = {**MINIMAX, **(changes or {})}
        (folder / "config.json").write_text(json.dumps(raw))
        (folder / "tokenizer.json").write_text("{}")
        (folder / "README.md").write_text("not copied")
        tensors = random_tensors(raw, dtype) if tensors is None else tensors
        files = {f"part-{i}.safetensors": sorted(tensors)[i::num_files] for i in range(num_files)}
        for file, names in files.items():
            save_file({n: tensors[n] for n in names}, folder / file, metadata={"format": "pt"})
        weight_map = {n: file for file, names in files.items() for n in names}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return make
