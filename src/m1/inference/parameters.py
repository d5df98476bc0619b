"""The parameters of a GPTModel as decoding reads them: in place, whatever modules hold them.

Shapes: h hidden, H heads and KV key-value heads of this rank, D head dim, W = H D, E experts of
this rank, F width of a feed-forward, V rows of the embedding.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.attention import SelfAttention

from m1.config.schema import BranchScales
from m1.model.block import HybridConfig
from m1.types import M1Error


@dataclass
class Lightning:
    """Lightning attention of one layer."""

    qkv: torch.Tensor
    """[3 W, h], head by head q, k, v."""
    gate: torch.Tensor
    """[W, h]."""
    out: torch.Tensor
    """[h, W]."""
    norm: torch.Tensor
    """[W]."""
    slopes: torch.Tensor
    """float32 [H]."""
    qkv_gate: torch.Tensor | None = None
    """[4 W, h], a copy of both: one product instead of two where copies are cheap."""


@dataclass
class Softmax:
    """Softmax attention of one layer."""

    qkv: torch.Tensor
    """[KV (H / KV + 2) D, h], group by group its queries, key, value."""
    bias: torch.Tensor | None
    out: torch.Tensor
    """[h, W]."""


@dataclass
class FeedForward:
    """Experts of one layer, or one dense feed-forward, the single expert without a router."""

    router: torch.Tensor | None
    """[all experts, h]."""
    first_expert: int
    fc1: list[torch.Tensor]
    """Of each expert [2 F, h], gate then up."""
    fc2: list[torch.Tensor]
    """Of each expert [h, F]."""
    shared: "FeedForward | None" = None
    all_fc1: torch.Tensor | None = None
    """[2 E F, h], a copy of all gates, then of all ups, where copies are cheap."""
    all_fc2: torch.Tensor | None = None
    """[h, E F]."""
    table: Any = None
    """`m1_kernels.routed_experts.ExpertTable` of fc1 and fc2, on a GPU."""


@dataclass
class Layer:
    """One transformer layer."""

    attention: Lightning | Softmax
    attention_norm: torch.Tensor
    attention_scales: BranchScales
    mlp: FeedForward
    mlp_norm: torch.Tensor
    mlp_scales: BranchScales
    cache_index: int
    """Number of the layer among those of its kind."""


@dataclass
class Parameters:
    """A whole model on this rank. Tensors are the trainer's own, but for the copies named so."""

    config: HybridConfig
    embedding: torch.Tensor
    """[V / tensor ranks, h]."""
    stored_head: torch.Tensor
    """[V / tensor ranks, h], which may be the embedding."""
    head: torch.Tensor
    """float32, the same tensor where that is float32 already."""
    final_norm: torch.Tensor
    inverse_frequencies: torch.Tensor
    """float32 [rotary_dim / 2]."""
    top_k: int
    tensor_group: Any
    """Process group, or None on one rank."""
    expert_group: Any
    layers: list[Layer] = field(default_factory=list)
    is_joined: bool = False
    """Whether `copy_joined` made its copies."""

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.embedding.device

    @property
    def vocab_size(self) -> int:
        """V."""
        ranks = self.tensor_group.size() if self.tensor_group else 1
        return int(self.embedding.shape[0] * ranks)


def read_parameters(model: torch.nn.Module) -> Parameters:
    """Find the parameters of a GPTModel from `m1.model.build`.

    Raises:
        M1Error: This rank holds a pipeline stage only.
    """
    gpt: Any = model
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        raise M1Error(
            "the engine needs all layers on every rank, but parallel.pipeline is above 1; sample "
            "from a model with tensor and expert ranks instead"
        )
    config: HybridConfig = gpt.config
    tied = gpt.share_embeddings_and_output_weights
    embedding = gpt.embedding.word_embeddings.weight.detach()
    head = embedding if tied else gpt.output_layer.weight.detach()
    found = Parameters(
        config=config,
        embedding=embedding,
        stored_head=head,
        head=head.float(),
        final_norm=gpt.decoder.final_layernorm.weight.detach(),
        inverse_frequencies=gpt.rotary_pos_emb.inv_freq.detach().to(embedding.device),
        top_k=config.moe_router_topk if config.num_moe_experts else 1,
        tensor_group=_group(parallel_state.get_tensor_model_parallel_group()),
        expert_group=_group(parallel_state.get_expert_tensor_and_model_parallel_group())
        if config.num_moe_experts
        else _group(parallel_state.get_tensor_model_parallel_group()),
    )
    counts = {Lightning: 0, Softmax: 0}
    for module in gpt.decoder.layers:
        layer = _layer(module, config, counts)
        counts[type(layer.attention)] += 1
        found.layers.append(layer)
    return found


def copy_joined(found: Parameters) -> None:
    """Copy weights that multiply the same input side by side; again after they change."""
    found.is_joined = True
    for layer in found.layers:
        if isinstance(layer.attention, Lightning):
            layer.attention.qkv_gate = torch.cat((layer.attention.qkv, layer.attention.gate))
        for mlp in (layer.mlp, layer.mlp.shared):
            if mlp is not None:
                halves = [weight.chunk(2) for weight in mlp.fc1]
                mlp.all_fc1 = torch.cat([*(gate for gate, _ in halves), *(up for _, up in halves)])
                mlp.all_fc2 = torch.cat(mlp.fc2, dim=1)


def _group(group: Any) -> Any:
    return group if group.size() > 1 else None


def _layer(module: Any, config: HybridConfig, counts: dict[type, int]) -> Layer:
    scales = config.residual
    attention: Lightning | Softmax
    if isinstance(module.self_attention, SelfAttention):
        attention, attention_scales = _softmax(module.self_attention), scales.softmax
    else:
        attention, attention_scales = _lightning(module.self_attention), scales.lightning
    return Layer(
        attention=attention,
        attention_norm=module.input_layernorm.weight.detach(),
        attention_scales=attention_scales,
        mlp=_feed_forward(module.mlp),
        mlp_norm=module.pre_mlp_layernorm.weight.detach(),
        mlp_scales=scales.mlp,
        cache_index=counts[type(attention)],
    )


def _lightning(module: Any) -> Lightning:
    weight = module.qkv_proj.weight.detach()
    slopes = module._slopes.to(weight.device)
    return Lightning(
        qkv=weight,
        gate=module.output_gate.weight.detach(),
        out=module.out_proj.weight.detach(),
        norm=module.norm_weight.detach(),
        slopes=slopes,
    )


def _softmax(module: Any) -> Softmax:
    bias = module.linear_qkv.bias
    return Softmax(
        qkv=module.linear_qkv.weight.detach(),
        bias=bias.detach() if bias is not None and bias.numel() else None,
        out=module.linear_proj.weight.detach(),
    )


def _feed_forward(module: Any) -> FeedForward:
    if not hasattr(module, "router"):
        fc1, fc2 = module.linear_fc1.weight.detach(), module.linear_fc2.weight.detach()
        return FeedForward(None, 0, [fc1], [fc2])
    shared = module.shared_experts
    first_expert = module.local_expert_indices[0]
    fc1 = list(_expert_weights(module.experts, "linear_fc1"))
    fc2 = list(_expert_weights(module.experts, "linear_fc2"))
    table = None
    if fc1[0].is_cuda:
        from m1_kernels.routed_experts import ExpertTable

        table = ExpertTable.of(fc1, fc2, first_expert=first_expert)
    return FeedForward(
        router=module.router.weight.detach(),
        first_expert=first_expert,
        fc1=fc1,
        fc2=fc2,
        shared=_feed_forward(shared) if shared is not None else None,
        table=table,
    )


def _expert_weights(experts: Any, name: str) -> Iterator[torch.Tensor]:
    if hasattr(experts, "local_experts"):
        yield from (getattr(expert, name).weight.detach() for expert in experts.local_experts)
        return
    grouped = getattr(experts, name)  # Transformer Engine's
    yield from (getattr(grouped, f"weight{e}").detach() for e in range(grouped.num_gemms))
