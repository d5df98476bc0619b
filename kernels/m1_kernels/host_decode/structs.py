"""The structs of `decode.c`, field by field, and weights as it reads them.

Shapes: N outputs, K inputs, B rows.
"""

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

PANEL = 16
_INTEGER, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class LayerStruct(ctypes.Structure):
    """`Layer`: one transformer layer and its part of the cache."""

    _fields_ = (
        _fields(_INTEGER, "is_softmax top_k num_experts ffn shared_ffn")
        + _fields(_FLOAT, "attention_alpha attention_beta mlp_alpha mlp_beta")
        + _fields(_POINTER, "attention_norm mlp_norm in_ bias out inner_norm keep lost states keys")
        + _fields(_POINTER, "values router fc1 fc2 shared_fc1 shared_fc2")
        + _fields(_POINTER, "routed_experts")
    )


class ModelStruct(ctypes.Structure):
    """`Model`: sizes, embedding and head, and where the layers are."""

    _fields_ = (
        _fields(_INTEGER, "num_layers hidden heads groups dim rotary_dim vocab page_size")
        + _fields(_INTEGER, "is_post_norm")
        + _fields(_FLOAT, "norm_epsilon inner_epsilon")
        + _fields(_POINTER, "embedding final_norm head inverse_frequencies layers")
    )


class BatchStruct(ctypes.Structure):
    """`Batch`: the rows of a step and where their logits go."""

    _fields_ = _fields(_INTEGER, "row_pages") + _fields(
        _POINTER, "tokens positions slots pages logits"
    )


def panels(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] as [ceil(N / 16), K, 16], zero beyond N."""
    weight = F.pad(weight, (0, 0, 0, -weight.shape[0] % PANEL)).contiguous()
    return weight.view(-1, PANEL, weight.shape[1]).transpose(1, 2).contiguous()


def fill(struct: Any, values: Mapping[str, Any]) -> list[torch.Tensor]:
    """Set fields, tensors by their address.

    Args:
        struct: One of the above.
        values: Numbers, tensors (of the field's type, contiguous, on the CPU) or None.

    Returns:
        The tensors, which must outlive the struct's use.
    """
    kept = []
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            kind = _DTYPES.get(name, torch.float32)
            assert value.dtype == kind and value.is_contiguous() and value.device.type == "cpu"
            kept.append(value)
            value = value.data_ptr()
        setattr(struct, name, value)
    return kept


_DTYPES = {
    **dict.fromkeys(("tokens", "positions", "slots", "pages"), torch.int64),
    "routed_experts": torch.int16,
}
