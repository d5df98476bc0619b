"""Which modules a layer is made of: megatron-core's own, or Transformer Engine's on a GPU."""

import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from m1.config.schema import ModelConfig
from m1.model.block import HybridConfig, HybridLayer, RMSNorm
from m1.model.lightning import LightningAttention, LightningSubmodules
from m1.model.softmax import SoftmaxAttention
from m1.types import M1Error


def uses_transformer_engine(model: ModelConfig) -> bool:
    """Whether the modules are Transformer Engine's: on a GPU, unless the arithmetic is FP32.

    Raises:
        M1Error: FP8 without a GPU, or a GPU without Transformer Engine.
    """
    if not torch.cuda.is_available():
        if model.precision == "fp8":
            raise M1Error(
                "model.precision is 'fp8', but no GPU is visible, and FP8 needs one; set it to "
                "'fp32' here"
            )
        return False
    if model.precision == "fp32":
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        raise M1Error(
            f"model.precision is {model.precision!r}, which on a GPU needs Transformer Engine, but "
            f"it cannot be imported ({error}); pip install 'm1[gpu]', or set precision to 'fp32'"
        ) from error
    return True


def block_spec(model: ModelConfig, config: HybridConfig) -> TransformerBlockSubmodules:
    """The layers that this pipeline stage builds, lightning or softmax by the pattern."""
    offset = get_transformer_layer_offset(config)
    kinds = model.layer_kinds[offset : offset + get_num_layers_to_build(config)]
    with_te = uses_transformer_engine(model)
    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(kind, model, with_te=with_te) for kind in kinds],
        layer_norm=_norm(with_te),
    )


def _layer_spec(kind: str, model: ModelConfig, *, with_te: bool) -> ModuleSpec:
    return ModuleSpec(
        module=HybridLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=_norm(with_te),
            self_attention=_lightning(with_te) if kind == "lightning" else _softmax(with_te),
            pre_mlp_layernorm=_norm(with_te),
            mlp=_feed_forward(model, with_te),
        ),
    )


def _norm(with_te: bool) -> type:
    if not with_te:
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm  # type: ignore[no-any-return]


def _linears(with_te: bool) -> tuple[type, type]:
    if not with_te:
        return ColumnParallelLinear, RowParallelLinear
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TERowParallelLinear,
    )

    return TEColumnParallelLinear, TERowParallelLinear


def _lightning(with_te: bool) -> ModuleSpec:
    column, row = _linears(with_te)
    return ModuleSpec(
        module=LightningAttention,
        submodules=LightningSubmodules(qkv_proj=column, output_gate=column, out_proj=row),
    )


def _softmax(with_te: bool) -> ModuleSpec:
    column, row = _linears(with_te)
    core: type = IdentityOp
    if with_te:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        core = TEDotProductAttention
    return ModuleSpec(
        module=SoftmaxAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(linear_qkv=column, core_attention=core, linear_proj=row),
    )


def _feed_forward(model: ModelConfig, with_te: bool) -> ModuleSpec:
    if model.moe is not None:
        return get_moe_module_spec(
            use_te=with_te, num_experts=model.moe.num_experts, moe_grouped_gemm=with_te
        )
    column, row = _linears(with_te)
    return ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row))
