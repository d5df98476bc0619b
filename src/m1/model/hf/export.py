"""A [model] table as config.json of a Hugging Face layout, where one can express it."""

from collections.abc import Mapping
from typing import Any, get_args

from m1.config.schema import BranchScales, ModelConfig
from m1.model.hf.config import LIGHTNING_NORM_EPSILON
from m1.model.hf.layouts import Layout
from m1.types import M1Error

TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def problems(config: ModelConfig, layout: Layout) -> list[str]:
    """Why a layout cannot express a model; empty where it can."""
    if layout in ("llama", "qwen2"):
        return _dense_problems(config, layout)
    found = []
    if config.moe is None:
        found.append("the model is dense; it has expert layers only")
    elif config.moe.shared_ffn_hidden_size:
        found.append("it has no shared expert that is simply added")
    if config.qkv_bias:
        found.append("its projections have no bias (qkv_bias)")
    has_lightning = "lightning" in config.layer_kinds
    if has_lightning and config.lightning_norm_epsilon != LIGHTNING_NORM_EPSILON:
        found.append("its lightning norm epsilon is fixed at 1e-6")
    if layout == "published":
        if has_lightning and config.num_heads & (config.num_heads - 1):
            found.append(f"its slopes differ where num_heads, {config.num_heads}, is no power of 2")
        return found
    if "softmax" in config.layer_kinds and config.rotary_dim != config.head_dim:
        found.append(f"rotary_dim {config.rotary_dim} differs from head_dim {config.head_dim}")
    if config.norm != "post":
        found.append("its residual is the normalised input (norm = 'post')")
    return found


def _dense_problems(config: ModelConfig, layout: Layout) -> list[str]:
    found = []
    if config.moe is not None:
        found.append("it has no experts")
    if "lightning" in config.layer_kinds:
        found.append("it has no lightning layers")
    if config.norm != "pre":
        found.append("its residual is the input before the norm (norm = 'pre')")
    scales = config.residual_scales
    if {scales.softmax, scales.mlp} != {BranchScales()}:
        found.append("it does not scale residuals (alpha = beta = 1)")
    if config.rotary_dim != config.head_dim:
        found.append(f"rotary_dim {config.rotary_dim} differs from head_dim {config.head_dim}")
    if config.qkv_bias != (layout == "qwen2"):
        has = "have" if layout == "qwen2" else "have no"
        found.append(f"its query, key and value projections {has} biases (qkv_bias)")
    if layout == "llama" and config.hidden_size % config.num_heads:
        found.append(f"its hidden_size must be a multiple of num_heads {config.num_heads}")
    return found


def choose_layout(config: ModelConfig) -> Layout:
    """The first layout that can express a model: one of transformers' own, else the published one.

    Raises:
        M1Error: There is none; every reason is named.
    """
    candidates: tuple[Layout, ...]
    if config.moe is not None:
        candidates = ("minimax", "published")
    else:
        candidates = ("qwen2" if config.qkv_bias else "llama",)
    for layout in candidates:
        if not problems(config, layout):
            return layout
    reasons = [f"as {layout}: {'; '.join(problems(config, layout))}" for layout in candidates]
    raise M1Error(
        "this [model] has no Hugging Face layout ("
        + ". ".join(reasons)
        + "). Change [model]; a run without [register] needs no layout"
    )


def require_representable(config: ModelConfig, layout: Layout | None = None) -> Layout:
    """The layout, or the one that fits; raise unless it can express the model.

    Raises:
        M1Error: It cannot; every reason is named.
    """
    if layout is None:
        return choose_layout(config)
    found = problems(config, layout)
    if found:
        able = [name for name in get_args(Layout) if not problems(config, name)]
        raise M1Error(
            f"this [model] cannot be written in the {layout} layout: "
            + "; ".join(found)
            + f". {'It fits ' + ' and '.join(able) if able else 'Change [model]'}"
        )
    return layout


def write_config(
    config: ModelConfig,
    layout: Layout,
    *,
    dtype: str = "float32",
    token_ids: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """config.json of a model.

    Args:
        config: With `vocab_size`.
        layout: One that can express it.
        dtype: Of the weights, in torch's words.
        token_ids: Values of `TOKEN_KEYS`; absent ones become null.
    """
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        **{key: (token_ids or {}).get(key) for key in TOKEN_KEYS},
    }
    if layout == "published":
        return common | _moe_part(config) | _published_part(config) | {"torch_dtype": dtype}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    common |= {"dtype": dtype, "rope_parameters": rope}
    if layout == "minimax":
        return common | _moe_part(config) | _minimax_part(config)
    dense = {"model_type": layout, "intermediate_size": config.ffn_hidden_size}
    if layout == "llama":
        biases = {"attention_bias": False, "mlp_bias": False}
        return common | dense | biases | {"architectures": ["LlamaForCausalLM"]}
    return common | dense | {"use_sliding_window": False, "architectures": ["Qwen2ForCausalLM"]}


def _moe_part(config: ModelConfig) -> dict[str, Any]:
    assert config.moe is not None
    return {
        "intermediate_size": config.moe.ffn_hidden_size,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "router_aux_loss_coef": config.moe.aux_loss_coefficient,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    }


def _published_part(config: ModelConfig) -> dict[str, Any]:
    scales = config.residual_scales
    return {
        "architectures": ["MiniMaxText01ForCausalLM"],
        "model_type": "minimax_text_01",
        "attn_type_list": [int(kind == "softmax") for kind in config.layer_kinds],
        "postnorm": config.norm == "post",
        "rotary_dim": config.rotary_dim,
        "rope_theta": config.rope_theta,
        "shared_intermediate_size": 0,
        **_scale_keys(scales.softmax, "layernorm_full_attention_{}"),
        **_scale_keys(scales.lightning, "layernorm_linear_attention_{}"),
        **_scale_keys(scales.mlp, "layernorm_mlp_{}"),
    }


def _minimax_part(config: ModelConfig) -> dict[str, Any]:
    scales = config.residual_scales
    return {
        "architectures": ["MiniMaxForCausalLM"],
        "model_type": "minimax",
        "layer_types": [
            "linear_attention" if kind == "lightning" else "full_attention"
            for kind in config.layer_kinds
        ],
        **_scale_keys(scales.softmax, "full_attn_{}_factor"),
        **_scale_keys(scales.lightning, "linear_attn_{}_factor"),
        **_scale_keys(scales.mlp, "mlp_{}_factor"),
    }


def _scale_keys(scales: BranchScales, pattern: str) -> dict[str, float]:
    return {pattern.format("alpha"): scales.alpha, pattern.format("beta"): scales.beta}
