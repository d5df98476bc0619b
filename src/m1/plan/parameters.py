"""Parameters of a model, counted matrix by matrix as `m1.model` builds them.

Letters: h hidden size, w = num_heads * head_dim, g = num_kv_heads * head_dim, f width of a SwiGLU,
E experts, V rows of the embedding. Counts are exact; a test holds them equal to built models.
"""

from dataclasses import dataclass
from typing import Literal

from m1.config.model_tables import ModelConfig

Shard = Literal["replicated", "tensor", "expert"]
"""Over which ranks a matrix is cut: none, tensor parallel, or expert times expert tensor."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are cut, stored and used in the same way."""

    name: str
    total: int
    active: int
    """Those that take part for one token."""
    shard: Shard
    is_matmul: bool = True
    """Whether a token is multiplied by them (norms, biases and the embedding's rows are not)."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a whole model."""

    total: int
    active: int
    """Those that take part for one token, without embedding and head (the paper's 45.9 B)."""
    embedding: int
    head: int
    """0 where the head shares the embedding's weight."""
    by_name: dict[str, int]


def layer_groups(model: ModelConfig, kind: str) -> list[ParameterGroup]:
    """Parameters of one layer, `kind` being "lightning" or "softmax" (MiniMax-01 report, sec. 2).

    Lightning: qkv 3wh, output gate wh, output hw, norm over the heads w. Softmax: qkv (w + 2g) h,
    output hw. Two RMSNorms h each.
    """
    h, w = model.hidden_size, model.num_heads * model.head_dim
    g = model.num_kv_heads * model.head_dim
    groups = [_all_active("norms", 2 * h, "replicated", is_matmul=False)]
    if kind == "lightning":
        groups.append(_all_active("lightning", 5 * w * h, "tensor"))
        groups.append(_all_active("norms", w, "tensor", is_matmul=False))
    else:
        groups.append(_all_active("softmax", 2 * (w + g) * h, "tensor"))
        if model.qkv_bias:
            groups.append(_all_active("biases", w + 2 * g, "tensor", is_matmul=False))
    return groups + _feed_forward_groups(model)


def embedding_groups(model: ModelConfig, vocab_size: int) -> list[ParameterGroup]:
    """The embedding: V rows of h, of which a token takes one and multiplies none."""
    size = vocab_size * model.hidden_size
    return [ParameterGroup("embedding", size, 0, "tensor", is_matmul=False)]


def head_groups(model: ModelConfig, vocab_size: int) -> list[ParameterGroup]:
    """The final norm h and the untied head Vh; a tied head is the embedding's weight."""
    groups = [_all_active("norms", model.hidden_size, "replicated", is_matmul=False)]
    if not model.tie_embeddings:
        groups.append(ParameterGroup("head", vocab_size * model.hidden_size, 0, "tensor"))
    return groups


def count_parameters(model: ModelConfig, vocab_size: int) -> ParameterCount:
    """Parameters of the whole model.

    Args:
        model: The architecture.
        vocab_size: Rows of the embedding, after padding.
    """
    groups = embedding_groups(model, vocab_size) + head_groups(model, vocab_size)
    for kind in model.layer_kinds:
        groups += layer_groups(model, kind)
    by_name: dict[str, int] = {}
    for group in groups:
        by_name[group.name] = by_name.get(group.name, 0) + group.total
    return ParameterCount(
        total=sum(group.total for group in groups),
        active=sum(group.active for group in groups),
        embedding=by_name["embedding"],
        head=by_name.get("head", 0),
        by_name=by_name,
    )


def _feed_forward_groups(model: ModelConfig) -> list[ParameterGroup]:
    """SwiGLU 3fh; as a mixture E of them, a router Eh and perhaps a shared expert."""
    h, moe = model.hidden_size, model.moe
    if moe is None:
        return [_all_active("mlp", 3 * h * (model.ffn_hidden_size or 0), "tensor")]
    expert = 3 * h * moe.ffn_hidden_size
    groups = [
        _all_active("router", moe.num_experts * h, "replicated"),
        ParameterGroup("experts", moe.num_experts * expert, moe.top_k * expert, "expert"),
    ]
    if moe.shared_ffn_hidden_size:
        shared = 3 * h * moe.shared_ffn_hidden_size
        groups.append(_all_active("shared_experts", shared, "tensor"))
    return groups


def _all_active(name: str, count: int, shard: Shard, *, is_matmul: bool = True) -> ParameterGroup:
    return ParameterGroup(name, count, count, shard, is_matmul)
