"""Names of a model's tensors in Hugging Face files, and where each lies in our parameters.

The published MiniMax layout and transformers' native `minimax` share their names, and so do Llama
and Qwen2: the names follow from the architecture, the layout decides config.json.

Shapes: H query heads, KV key-value heads, D head dim, W width of a feed-forward.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from m1.config.schema import ModelConfig
from m1.types import M1Error

if TYPE_CHECKING:
    import torch

Layout = Literal["published", "minimax", "llama", "qwen2"]
"""`published`: MiniMax-Text-01 and M1; `minimax`, `llama`, `qwen2`: transformers' own models."""

Shape = tuple[int, ...]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_TOP = {
    "embedding.word_embeddings.weight": EMBEDDING,
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": HEAD,
}
_IN_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.qkv_proj.weight": "self_attn.qkv_proj.weight",
    "self_attention.output_gate.weight": "self_attn.output_gate.weight",
    "self_attention.out_proj.weight": "self_attn.out_proj.weight",
    "self_attention.norm_weight": "self_attn.norm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.router.weight": "block_sparse_moe.gate.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_QKV = re.compile(r"self_attention\.linear_qkv\.(weight|bias)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(?P<e>\d+)\.linear_(?P<fc>fc1|fc2)\.weight")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.linear_(?P<fc>fc1|fc2)\.weight(?P<e>\d+)")
"""Transformer Engine's grouped experts."""


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of a model in Hugging Face form, in the order of its files.

    Args:
        config: With `vocab_size`.
    """
    assert config.vocab_size is not None
    width = config.hidden_size
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, width)}
    for layer, kind in enumerate(config.layer_kinds):
        attention = _lightning_shapes(config) if kind == "lightning" else _softmax_shapes(config)
        inside = {
            "input_layernorm.weight": (width,),
            **attention,
            "post_attention_layernorm.weight": (width,),
            **_feed_forward_shapes(config),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in inside.items()}
    shapes["model.norm.weight"] = (width,)
    if not config.tie_embeddings:
        shapes[HEAD] = (config.vocab_size, width)
    return shapes


def _lightning_shapes(config: ModelConfig) -> dict[str, Shape]:
    width, inner = config.hidden_size, config.num_heads * config.head_dim
    return {
        "self_attn.qkv_proj.weight": (3 * inner, width),
        "self_attn.output_gate.weight": (inner, width),
        "self_attn.out_proj.weight": (width, inner),
        "self_attn.norm.weight": (inner,),
    }


def _softmax_shapes(config: ModelConfig) -> dict[str, Shape]:
    width = config.hidden_size
    rows = {
        "q": config.num_heads * config.head_dim,
        "k": config.num_kv_heads * config.head_dim,
        "v": config.num_kv_heads * config.head_dim,
    }
    shapes: dict[str, Shape] = {}
    for part, count in rows.items():
        shapes[f"self_attn.{part}_proj.weight"] = (count, width)
        if config.qkv_bias:
            shapes[f"self_attn.{part}_proj.bias"] = (count,)
    return {**shapes, "self_attn.o_proj.weight": (width, rows["q"])}


def _feed_forward_shapes(config: ModelConfig) -> dict[str, Shape]:
    width = config.hidden_size
    if config.moe is None:
        assert config.ffn_hidden_size is not None
        names, inner = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), config.ffn_hidden_size
        return _swiglu_shapes(names, inner, width)
    inner = config.moe.ffn_hidden_size
    shapes: dict[str, Shape] = {"block_sparse_moe.gate.weight": (config.moe.num_experts, width)}
    for expert in range(config.moe.num_experts):
        place = f"block_sparse_moe.experts.{expert}"
        shapes |= _swiglu_shapes((f"{place}.w1", f"{place}.w3", f"{place}.w2"), inner, width)
    return shapes


def _swiglu_shapes(names: tuple[str, str, str], inner: int, width: int) -> dict[str, Shape]:
    gate, up, down = (f"{name}.weight" for name in names)
    return {gate: (inner, width), up: (inner, width), down: (width, inner)}


def hf_views(
    tensors: Mapping[str, "torch.Tensor"], config: ModelConfig
) -> dict[str, "torch.Tensor"]:
    """See a whole model's tensors under their Hugging Face names, without copying.

    Args:
        tensors: Parameters of a GPTModel on one rank by name, or tensors shaped like them, such as
            their gradients.
        config: The architecture, with `vocab_size`.

    Returns:
        Views in the order of `tensor_shapes`, with as many elements in the same order as there; the
        rows of a fused projection may lie apart and have axes of their own. What is copied into a
        view changes the parameter.

    Raises:
        M1Error: A tensor has no counterpart or is missing; all such names are listed.
    """
    found: dict[str, torch.Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        converted = views_of(name, tensor, config)
        if converted is None:
            unknown.append(name)
        else:
            found |= converted
    shapes = tensor_shapes(config)
    problems = [f"{name} has no place there" for name in unknown]
    problems += [f"{name} is not in the model" for name in shapes if name not in found]
    problems += [
        f"{name} has {found[name].numel()} elements instead of shape {list(shape)}"
        for name, shape in shapes.items()
        if name in found and found[name].numel() != _product(shape)
    ]
    problems += [f"{name} is not in the architecture" for name in found if name not in shapes]
    if problems:
        raise M1Error(
            "the model's tensors do not fit the Hugging Face layout of this [model]: "
            + "; ".join(problems)
            + ". Give the whole model of one process, and the [model] it was built from"
        )
    return {name: found[name] for name in shapes}


def views_of(
    name: str, tensor: "torch.Tensor", config: ModelConfig
) -> dict[str, "torch.Tensor"] | None:
    """The part of `hf_views` that lies in one parameter; None for a name without a counterpart."""
    if name in _TOP:
        return {_TOP[name]: tensor}
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    prefix, rest = f"model.layers.{match[1]}", match[2]
    if rest in _IN_LAYER:
        return {f"{prefix}.{_IN_LAYER[rest]}": tensor}
    if fused := _QKV.fullmatch(rest):
        parts = zip("qkv", split_qkv(tensor, config), strict=True)
        return {f"{prefix}.self_attn.{part}_proj.{fused[1]}": rows for part, rows in parts}
    if rest == "mlp.linear_fc1.weight":
        gate, up = tensor.chunk(2)
        return {f"{prefix}.mlp.gate_proj.weight": gate, f"{prefix}.mlp.up_proj.weight": up}
    expert = _EXPERT.fullmatch(rest) or _GROUPED_EXPERT.fullmatch(rest)
    if expert is None:
        return None
    place = f"{prefix}.block_sparse_moe.experts.{expert['e']}"
    if expert["fc"] == "fc2":
        return {f"{place}.w2.weight": tensor}
    gate, up = tensor.chunk(2)
    return {f"{place}.w1.weight": gate, f"{place}.w3.weight": up}


def split_qkv(
    fused: "torch.Tensor", config: ModelConfig
) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """View megatron's fused rows, per group [q ... q, k, v], as those of q, k and v.

    Args:
        fused: [(H + 2 KV) * D, hidden], or [(H + 2 KV) * D] for a bias.
        config: The architecture.

    Returns:
        [KV, H / KV, D, hidden] and twice [KV, 1, D, hidden]; without the last axis for a bias.
    """
    per_group = config.num_heads // config.num_kv_heads
    grouped = fused.view(config.num_kv_heads, per_group + 2, config.head_dim, *fused.shape[1:])
    return grouped[:, :per_group], grouped[:, per_group:-1], grouped[:, -1:]


def _product(shape: Shape) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
