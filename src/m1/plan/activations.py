"""What the forward pass keeps for the backward pass: the tensors, and which survive recomputation.

Two implementations of the layers keep different tensors: `activations_te` lists those of the GPU
(Transformer Engine, BF16 or FP8), `activations_torch` those of plain torch in FP32. Each has one
entry for each tensor, so that a measurement that disagrees points at a line. Temporaries that die
inside a forward or backward pass are not in either.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from m1.config.model_tables import ModelConfig
from m1.config.training_tables import ParallelConfig

Recompute = Literal["none", "selective", "full"]
_STRENGTH: dict[Recompute, int] = {"none": 0, "selective": 1, "full": 2}


@dataclass(frozen=True)
class Saved:
    """One tensor that autograd keeps."""

    name: str
    num_bytes: float
    """Bytes on one GPU for one micro-batch."""
    survives: Recompute = "selective"
    """Strongest recomputation under which it is still kept: under `selective` the experts' SwiGLU
    goes, on GPUs, and the inside of the norm after lightning attention; under `full` all but the
    layer's input."""


@dataclass(frozen=True)
class Share:
    """One GPU's share of one micro-batch, by letters.

    t tokens (split over context ranks), s tokens where sequence parallelism splits them further,
    m rows of its experts when routing is even, w and g widths of its query and key-value heads.
    """

    t: float
    s: float
    m: float
    w: float
    g: float
    heads: float
    tensor: int
    expert_tensor: int


def share_of(model: ModelConfig, parallel: ParallelConfig, micro_batch_tokens: int) -> Share:
    """What one GPU holds of a micro-batch.

    Experts: a GPU sends s * top_k rows and, when routing is even, receives as many; the ranks of
    one expert's tensor group gather theirs, hence times expert_tensor.
    """
    tokens = micro_batch_tokens / parallel.context
    split = tokens / parallel.tensor
    top_k = model.moe.top_k if model.moe else 0
    heads = model.num_heads / parallel.tensor
    return Share(
        t=tokens,
        s=split,
        m=split * top_k * parallel.expert_tensor_size,
        w=heads * model.head_dim,
        g=model.num_kv_heads * model.head_dim / parallel.tensor,
        heads=heads,
        tensor=parallel.tensor,
        expert_tensor=parallel.expert_tensor_size,
    )


def kept_bytes(tensors: Iterable[Saved], recompute: Recompute) -> float:
    """Bytes of the tensors that are kept until the backward pass."""
    return sum(x.num_bytes for x in tensors if _STRENGTH[x.survives] >= _STRENGTH[recompute])


def dropped_bytes(tensors: Iterable[Saved], recompute: Recompute) -> float:
    """Bytes of the tensors that are made again: held for one layer at a time."""
    return sum(x.num_bytes for x in tensors if _STRENGTH[x.survives] < _STRENGTH[recompute])


def router_bytes(tokens: float, *, num_experts: int, top_k: int) -> float:
    """What megatron-core's router and dispatcher keep (0.16.1, the same code on CPU and GPU).

    Of each token: probabilities of the auxiliary loss and of the dispatcher, float32 [E] each, and
    the map of experts, bool [E]; probabilities of the chosen experts twice, float32 [k]; their
    indices twice and the rows' origins once, int64 [k].
    """
    return tokens * (9 * num_experts + 32 * top_k)
