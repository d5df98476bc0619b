"""From a recipe's [model] table to a megatron-core GPTModel."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from m1.config.schema import ModelConfig, ParallelConfig
from m1.model.layers import (
    HybridConfig,
    HybridLayer,
    LightningAttention,
    LightningSubmodules,
    RMSNorm,
    SoftmaxAttention,
)
from m1.types import M1Error


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, *, aux_loss_coefficient: float | None = None
) -> HybridConfig:
    """Megatron's configuration of the model under a parallel layout."""
    moe: dict[str, Any] = {"ffn_hidden_size": model.ffn_hidden_size}
    if model.moe is not None:
        moe = {
            "num_moe_experts": model.moe.num_experts,
            "moe_router_topk": model.moe.top_k,
            "moe_router_pre_softmax": model.moe.top_k == 1,  # refused otherwise
            "ffn_hidden_size": model.moe.ffn_hidden_size,
            "moe_ffn_hidden_size": model.moe.ffn_hidden_size,
            "moe_shared_expert_intermediate_size": model.moe.shared_ffn_hidden_size or None,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": model.moe.aux_loss_coefficient
            if aux_loss_coefficient is None
            else aux_loss_coefficient,
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_dtype": "fp32",
        }
    return HybridConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        lightning_norm_epsilon=model.lightning_norm_epsilon,
        slope_depth_epsilon=model.slope_depth_epsilon,
        residual=model.residual_scales,
        is_post_norm=model.norm == "post",
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        expert_model_parallel_size=parallel.expert,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.tensor > 1,
        **moe,
    )


def layer_specs(model: ModelConfig, config: HybridConfig) -> list[ModuleSpec]:
    """Specs of the layers that this pipeline stage builds, lightning or softmax by the pattern."""
    offset = get_transformer_layer_offset(config)
    kinds = model.layer_kinds[offset : offset + get_num_layers_to_build(config)]
    return [_layer_spec(kind, model) for kind in kinds]


def _layer_spec(kind: str, model: ModelConfig) -> ModuleSpec:
    num_experts = model.moe.num_experts if model.moe else None
    spec = get_gpt_layer_local_spec(num_experts=num_experts, normalization="RMSNorm")
    spec.module = HybridLayer
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    if kind == "lightning":
        spec.submodules.self_attention = ModuleSpec(
            module=LightningAttention,
            submodules=LightningSubmodules(
                qkv_proj=ColumnParallelLinear,
                output_gate=ColumnParallelLinear,
                out_proj=RowParallelLinear,
            ),
        )
    else:
        spec.submodules.self_attention.module = SoftmaxAttention
        spec.submodules.self_attention.submodules.core_attention = DotProductAttention
    return spec


def padded_vocab(model: ModelConfig, tokenizer_size: int) -> int:
    """Rows of the embedding: as configured, or the tokenizer's size rounded up to 64."""
    if model.vocab_size is None:
        return -(-tokenizer_size // 64) * 64
    if model.vocab_size < tokenizer_size:
        raise M1Error(
            f"model.vocab_size is {model.vocab_size}, but the tokenizer has {tokenizer_size} "
            "entries; raise it, or leave it out to take the tokenizer's size"
        )
    return model.vocab_size


def build_model(
    model: ModelConfig, *, vocab_size: int, seed: int, parallel: ParallelConfig | None = None
) -> GPTModel:
    """Build the model with initial weights that depend on `seed` and the architecture alone.

    Requires `m1.model.parallel.initialize`. In `eval()` mode, and with packed inputs: call it with
    tokens [1, T], position_ids [1, T], no mask, and `packed_seq_params` from `m1.model.packing`.

    Returns:
        A GPTModel that maps tokens to float32 logits [1, T, V], or to per-token losses [1, T] when
        given labels.
    """
    if model.precision != "fp32":
        raise M1Error(
            f"model.precision is {model.precision!r}, which needs Transformer Engine's modules, "
            "and this version builds the fp32 model only; set model.precision = 'fp32'"
        )
    config = transformer_config(model, parallel or ParallelConfig())
    torch.manual_seed(seed)
    return GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=layer_specs(model, config), layer_norm=RMSNorm),
        vocab_size=vocab_size,
        max_sequence_length=model.max_position,
        position_embedding_type="rope",
        # megatron truncates head_dim * percent: half a dimension keeps 30 of 44 from becoming 29
        rotary_percent=(model.rotary_dim + 0.5) / model.head_dim,
        rotary_base=model.rope_theta,
        share_embeddings_and_output_weights=model.tie_embeddings,
        fp16_lm_cross_entropy=False,
    )
