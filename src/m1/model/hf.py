"""Export in Hugging Face format: the layout of transformers' native `minimax` model.

That model always turns all dimensions of a softmax head, so only a model with rotary_dim = head_dim
has an equal there.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from m1.config.schema import ModelConfig
from m1.types import M1Error


def export_hf(
    model: torch.nn.Module,
    config: ModelConfig,
    folder: Path,
    *,
    eos_token_id: int,
    pad_token_id: int,
) -> None:
    """Write config.json, generation_config.json and model.safetensors below `folder`.

    Raises:
        M1Error: transformers' model cannot represent this architecture; every reason is named.
    """
    require_representable(config)
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    tensors = dict(convert_names(state, config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    vocab_size = tensors["model.embed_tokens.weight"].shape[0]
    written = hf_config(
        config, vocab_size=vocab_size, eos_token_id=eos_token_id, pad_token_id=pad_token_id
    )
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    generation = {
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 0.95,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def require_representable(config: ModelConfig) -> None:
    """Raise unless transformers' native `minimax` model computes the same function."""
    problems = []
    if config.rotary_dim != config.head_dim and "softmax" in config.layer_kinds:
        problems.append(f"rotary_dim {config.rotary_dim} differs from head_dim {config.head_dim}")
    if config.moe is None:
        problems.append("the model is dense; it has expert layers only")
    elif config.moe.shared_ffn_hidden_size:
        problems.append("it has no shared expert")
    if config.norm != "post":
        problems.append("its residual is the normalised input (norm = 'post')")
    if config.lightning_norm_epsilon != 1e-6 and "lightning" in config.layer_kinds:
        problems.append("its lightning norm epsilon is fixed at 1e-6")
    if problems:
        raise M1Error(
            "this [model] cannot be exported for transformers' MiniMaxForCausalLM: "
            + "; ".join(problems)
            + ". Change [model], or leave out [register]"
        )


def hf_config(
    config: ModelConfig, *, vocab_size: int, eos_token_id: int, pad_token_id: int
) -> dict[str, Any]:
    """config.json of the exported model."""
    assert config.moe is not None
    alpha, beta = config.residual_alpha, config.beta
    return {
        "architectures": ["MiniMaxForCausalLM"],
        "model_type": "minimax",
        "dtype": "float32",
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.moe.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "router_aux_loss_coef": config.moe.aux_loss_coefficient,
        "layer_types": [
            "linear_attention" if kind == "lightning" else "full_attention"
            for kind in config.layer_kinds
        ],
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        **{f"{part}_alpha_factor": alpha for part in ("full_attn", "linear_attn", "mlp")},
        **{f"{part}_beta_factor": beta for part in ("full_attn", "linear_attn", "mlp")},
    }


_PLAIN = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
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
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.linear_(fc1|fc2)\.weight")


def convert_names(
    state: dict[str, torch.Tensor], config: ModelConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a model on one rank under their names in the published layout.

    Raises:
        M1Error: A tensor has no counterpart; all such names are listed.
    """
    unknown = []
    for name, tensor in state.items():
        converted = _convert(name, tensor.detach(), config)
        if converted is None:
            unknown.append(name)
            continue
        for key, value in converted.items():
            yield key, value.contiguous().clone()
    if unknown:
        raise M1Error(f"no place in the Hugging Face layout for: {', '.join(sorted(unknown))}")


def _convert(
    name: str, tensor: torch.Tensor, config: ModelConfig
) -> dict[str, torch.Tensor] | None:
    if name in _PLAIN:
        return {_PLAIN[name]: tensor}
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    prefix, rest = f"model.layers.{match[1]}", match[2]
    if rest in _IN_LAYER:
        return {f"{prefix}.{_IN_LAYER[rest]}": tensor}
    if rest == "self_attention.linear_qkv.weight":
        names = ("q_proj", "k_proj", "v_proj")
        parts = split_qkv(tensor, config)
        return {
            f"{prefix}.self_attn.{n}.weight": part for n, part in zip(names, parts, strict=True)
        }
    expert = _EXPERT.fullmatch(rest)
    if expert is None:
        return None
    place = f"{prefix}.block_sparse_moe.experts.{expert[1]}"
    if expert[2] == "fc2":
        return {f"{place}.w2.weight": tensor}
    gate, up = tensor.chunk(2)
    return {f"{place}.w1.weight": gate, f"{place}.w3.weight": up}


def split_qkv(
    weight: torch.Tensor, config: ModelConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Megatron's fused rows, per group [q ... q, k, v], into q, k and v rows."""
    per_group, dim = config.num_heads // config.num_kv_heads, config.head_dim
    grouped = weight.view(config.num_kv_heads, per_group + 2, dim, -1)
    q, k, v = torch.split(grouped, [per_group, 1, 1], dim=1)
    width = weight.shape[-1]
    return q.reshape(-1, width), k.reshape(-1, width), v.reshape(-1, width)
