"""From a recipe's [model] table to a megatron-core GPTModel."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from m1.config.layout import layout_mistakes, stage_layers
from m1.config.schema import ModelConfig, ParallelConfig
from m1.model.block import HybridConfig
from m1.model.head import HybridModel, keep_float
from m1.model.routing import make_replayable
from m1.model.spec import block_spec, uses_transformer_engine
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
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        use_cpu_initialization=not torch.cuda.is_available(),
        recompute=parallel.recompute,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.tensor > 1,
        gradient_accumulation_fusion=False,
        variable_seq_lengths=parallel.pipeline > 1,
        **_pipeline(model, parallel),
        **(moe | _precision(model, parallel)),
    )


def _pipeline(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    if parallel.pipeline_layers is None:
        return {}
    stages = [["decoder"] * len(layers) for layers in stage_layers(model, parallel)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return {"pipeline_model_parallel_layout": stages}


def _precision(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    plain = {"bias_activation_fusion": False}
    if model.precision == "fp32":
        return {"params_dtype": torch.float32, "pipeline_dtype": torch.float32, **plain}
    settings: dict[str, Any] = {
        **plain,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "pipeline_dtype": torch.bfloat16,
    }
    if uses_transformer_engine(model):
        settings |= {
            "moe_permute_fusion": True,
            **({"moe_token_dispatcher_type": "allgather"} if _stays_here(parallel) else {}),
            "bias_activation_fusion": True,
        }
        if parallel.recompute == "selective":
            settings |= {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
    if model.precision == "fp8":
        ends = model.fp8_bf16_ends
        settings |= {
            "fp8": "e4m3" if model.fp8_recipe == "blockwise" else "hybrid",
            "fp8_recipe": model.fp8_recipe,
            "first_last_layers_bf16": ends > 0,
            "num_layers_at_start_in_bf16": ends,
            "num_layers_at_end_in_bf16": ends,
        }
    return settings


def build_model(
    model: ModelConfig, *, vocab_size: int, seed: int, parallel: ParallelConfig | None = None
) -> HybridModel:
    """Build this rank's part of the model, on the GPU if there is one.

    Requires `m1.model.parallel.initialize` with the same layout. Initial weights depend on `seed`,
    the architecture, and how layers and experts are divided; on GPUs on the tensor ranks too. With
    packed inputs: call it with tokens [1, T], position_ids [1, T], no mask, and `packed_seq_params`
    from `m1.model.packing`.

    Returns:
        A model that maps tokens to float32 logits [1, T, V], or to per-token losses [1, T] when
        given labels.

    Raises:
        M1Error: The model cannot be laid out so, or needs what this machine lacks; nothing has been
            allocated then.
    """
    parallel = parallel or ParallelConfig()
    mistakes = layout_mistakes(model, parallel)
    if mistakes:
        raise M1Error("parallel." + "; parallel.".join(mistakes))
    config = transformer_config(model, parallel)
    _forget_router_metrics()
    torch.manual_seed(seed)
    if torch.cuda.is_available():  # megatron initialises from generators of its own there
        model_parallel_cuda_manual_seed(seed)
    is_last = parallel_state.is_pipeline_last_stage()
    built = HybridModel(
        config,
        block_spec(model, config),
        vocab_size=vocab_size,
        max_sequence_length=model.max_position,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=is_last,
        position_embedding_type="rope",
        # megatron truncates head_dim * percent: half a dimension keeps 30 of 44 from becoming 29
        rotary_percent=(model.rotary_dim + 0.5) / model.head_dim,
        rotary_base=model.rope_theta,
        share_embeddings_and_output_weights=model.tie_embeddings,
        fp16_lm_cross_entropy=False,
    )
    if is_last:
        keep_float(built.output_layer)
        _put_first(built, "output_layer")
    make_replayable(built)
    if uses_transformer_engine(model) and model.moe is not None:
        from m1.model.experts import use_our_kernels

        use_our_kernels(built, is_fp8=model.precision == "fp8")
    on_meta = any(parameter.is_meta for parameter in built.parameters())
    return built.cuda() if torch.cuda.is_available() and not on_meta else built


def _put_first(model: torch.nn.Module, name: str) -> None:
    """Make a child the first, so that its parameters come first.

    In a group of parameters of two types megatron's distributed optimizer puts the float32 ones
    first, but looks them up in the order of the model.
    """
    children = dict(model._modules)
    model._modules.clear()
    model._modules.update({name: children.pop(name), **children})


def _stays_here(parallel: ParallelConfig) -> bool:
    """Whether tokens reach all experts without leaving their GPU."""
    return parallel.world_size == parallel.data


def _forget_router_metrics() -> None:
    """Drop the process's table of auxiliary losses, which has the depth of the first model."""
    try:
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    except ImportError:  # before megatron-core 0.17
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        get_moe_layer_wise_logging_tracker().clear()
    else:
        destroy_moe_metrics_tracker()
