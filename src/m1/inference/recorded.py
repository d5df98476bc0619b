"""Recorded experts as tensors, and as what travels with a completion.

Shapes: T tokens, L layers, k experts of a token.
"""

import base64

import numpy as np
import torch

from m1.types import M1Error, RoutedExperts

_TYPE = np.dtype("<i2")


def pack_experts(experts: torch.Tensor) -> RoutedExperts:
    """Experts int16 [T, L, k] on the CPU as a completion carries them."""
    _, num_layers, top_k = experts.shape
    values = experts.numpy().astype(_TYPE).tobytes()
    return RoutedExperts(base64.b64encode(values).decode("ascii"), num_layers, top_k)


def unpack_experts(found: RoutedExperts, *, num_tokens: int, num_experts: int) -> torch.Tensor:
    """The tensor int16 [T, L, k] again.

    Args:
        found: What an engine recorded.
        num_tokens: T.
        num_experts: Of the model.

    Raises:
        M1Error: It is of another number of tokens, or names experts that there are not.
    """
    data = base64.b64decode(found.values)
    shape = num_tokens, found.num_layers, found.top_k
    if len(data) != _TYPE.itemsize * num_tokens * found.num_layers * found.top_k:
        raise M1Error(
            f"the engine recorded {len(data)} bytes of experts, but {num_tokens} tokens by "
            f"{found.num_layers} layers by {found.top_k} make another number; the engine is "
            "another version, or broken"
        )
    values = np.frombuffer(data, dtype=_TYPE).astype(np.int16).reshape(shape)
    if values.size and not (values.min() >= 0 and values.max() < num_experts):
        raise M1Error(
            f"the engine recorded experts {values.min()} to {values.max()}, but the model has 0 to "
            f"{num_experts - 1}; it serves another model, or is broken"
        )
    return torch.from_numpy(values)
