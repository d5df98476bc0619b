"""Hugging Face conversion both ways.

`load_hf` and `save_hf` exchange models with folders in the published MiniMax-Text-01/M1 layout and
in those of transformers' `minimax`, `llama` and `qwen2`; `m1.model.hf.convert` rewrites a folder
without building a model, and so without importing torch.
"""

from typing import TYPE_CHECKING, Any

from m1.model.hf.export import require_representable
from m1.model.hf.layouts import Layout

if TYPE_CHECKING:
    from m1.model.hf.module import HfModel, export_hf, load_hf, save_hf

__all__ = ["HfModel", "Layout", "export_hf", "load_hf", "require_representable", "save_hf"]


def __getattr__(name: str) -> Any:
    """Import megatron-core when a model is first wanted."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from m1.model.hf import module

    return getattr(module, name)
