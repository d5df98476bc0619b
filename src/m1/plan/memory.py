"""Memory of one GPU by kind, for every pipeline stage of a parallel layout.

Weights and optimizer: megatron-core's mixed precision and distributed optimizer (ZeRO stage 1,
arXiv 1910.02054, sec. 3.1: 2 + 2 + 12 bytes a parameter, with the gradient here in FP32).
Activations: `m1.plan.activations` for one micro-batch, times the micro-batches in flight under
1F1B (PipeDream-Flush; arXiv 2104.04473, sec. 2.2). Not counted: temporaries, communication
buffers, the CUDA context and fragmentation; `report` asks for a margin instead.
"""

from dataclasses import dataclass

from m1.config.layout import stage_layers
from m1.config.model_tables import ModelConfig
from m1.config.training_tables import ParallelConfig
from m1.plan import activations_te, activations_torch
from m1.plan.activations import dropped_bytes, kept_bytes, share_of
from m1.plan.parameters import ParameterGroup, embedding_groups, head_groups, layer_groups

_MOMENTS = 8
_MASTER = 4
_PAGE_TOKENS = 16
_STATE_ELEMENT = 4


@dataclass(frozen=True)
class Batch:
    """What one GPU works on at a time."""

    micro_batch_tokens: int
    """Tokens of one forward and backward, before context parallelism splits them."""
    num_micro_batches: int
    """Micro-batches of one update on one data-parallel replica."""


@dataclass(frozen=True)
class Decoding:
    """Sequences that one data-parallel replica decodes together; context ranks share none."""

    num_sequences: int
    length: int
    """Tokens of each."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each GPU of one pipeline stage."""

    stage: int
    layers: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    recurrent_states: float = 0.0
    kv_cache: float = 0.0

    @property
    def peak(self) -> float:
        """Training and decoding take turns, so only the larger of what they need on top counts."""
        changing = max(self.activations, self.recurrent_states + self.kv_cache)
        return self.weights + self.gradients + self.optimizer + changing


def plan_memory(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    vocab_size: int,
    batch: Batch,
    decoding: Decoding | None = None,
) -> list[StageMemory]:
    """Memory of a GPU of each pipeline stage.

    Args:
        model: The architecture.
        parallel: The layout.
        vocab_size: Rows of the embedding, after padding.
        batch: What a GPU trains on at a time.
        decoding: What it decodes between updates, where the stage samples.
    """
    stages = []
    for stage, layers in enumerate(stage_layers(model, parallel)):
        groups = _stage_groups(model, layers, vocab_size, num_stages=parallel.pipeline)
        kinds = [model.layer_kinds[layer] for layer in layers]
        states, cache = decoding_bytes(model, kinds, decoding) if decoding else (0.0, 0.0)
        stages.append(
            StageMemory(
                stage=stage,
                layers=len(layers),
                weights=sum(_weight_bytes(model, x) * _local(x, parallel) for x in groups),
                gradients=sum(4.0 * _local(x, parallel) for x in groups),
                optimizer=sum(_optimizer_bytes(model, x, parallel) for x in groups),
                activations=_activation_bytes(model, parallel, layers, vocab_size, batch),
                recurrent_states=states / parallel.tensor,
                kv_cache=cache / parallel.tensor,
            )
        )
    return stages


def decoding_bytes(model: ModelConfig, kinds: list[str], decoding: Decoding) -> tuple[float, float]:
    """Recurrent states and key-value cache of some layers, before tensor parallelism splits them.

    A lightning layer keeps float32 [H, D, D] of a sequence, whatever its length; a softmax layer
    keys and values [length, KV, D] in the trunk's precision (FP8 keeps BF16). The engine has one
    state and one page more, which rows of a padded batch write to.
    """
    dim = model.head_dim
    state = _STATE_ELEMENT * model.num_heads * dim * dim
    row = 2 * _element_bytes(model) * model.num_kv_heads * dim
    num_softmax = kinds.count("softmax")
    return (
        float((decoding.num_sequences + 1) * (len(kinds) - num_softmax) * state),
        float((decoding.num_sequences * decoding.length + _PAGE_TOKENS) * num_softmax * row),
    )


def micro_batches_in_flight(parallel: ParallelConfig, stage: int, num_micro_batches: int) -> int:
    """1F1B: a stage runs ahead of its first backward pass by the stages that follow it."""
    return min(num_micro_batches, parallel.pipeline - stage)


def _stage_groups(
    model: ModelConfig, layers: range, vocab_size: int, *, num_stages: int
) -> list[ParameterGroup]:
    groups = [x for layer in layers for x in layer_groups(model, model.layer_kinds[layer])]
    is_last = layers.stop == model.num_layers
    if layers.start == 0:
        groups += embedding_groups(model, vocab_size)
    if is_last:
        groups += head_groups(model, vocab_size)
        if model.tie_embeddings and num_stages > 1:  # megatron keeps a copy beside the head
            groups += embedding_groups(model, vocab_size)
    return groups


def _local(group: ParameterGroup, parallel: ParallelConfig) -> float:
    """Parameters of a group on one GPU."""
    expert_ranks = parallel.expert * parallel.expert_tensor_size
    ranks = {"replicated": 1, "tensor": parallel.tensor, "expert": expert_ranks}
    return group.total / ranks[group.shard]


def _element_bytes(model: ModelConfig) -> int:
    return 4 if model.precision == "fp32" else 2


def _is_fp32(model: ModelConfig, group: ParameterGroup) -> bool:
    """The head is FP32 at every precision (M1 sec. 3.2)."""
    return model.precision == "fp32" or group.name == "head"


def _weight_bytes(model: ModelConfig, group: ParameterGroup) -> int:
    """FP8 casts BF16 parameters where it multiplies; it stores none."""
    return 4 if _is_fp32(model, group) else 2


def _optimizer_bytes(model: ModelConfig, group: ParameterGroup, parallel: ParallelConfig) -> float:
    """Two FP32 moments, and an FP32 master copy of what is not FP32 itself.

    The distributed optimizer, on where `data` > 1, cuts them over the ranks that hold the same
    parameters: data * context, and for experts data * context * tensor / (expert *
    expert_tensor).
    """
    bytes_each = _MOMENTS if _is_fp32(model, group) else _MASTER + _MOMENTS
    ranks = 1
    if parallel.data > 1:
        ranks = parallel.data * parallel.context
        if group.shard == "expert":
            ranks = ranks * parallel.tensor // (parallel.expert * parallel.expert_tensor_size)
    return bytes_each * _local(group, parallel) / ranks


def _activation_bytes(
    model: ModelConfig, parallel: ParallelConfig, layers: range, vocab_size: int, batch: Batch
) -> float:
    """Kept tensors of the micro-batches in flight, and one layer's that are being made again."""
    share = share_of(model, parallel, batch.micro_batch_tokens)
    tensors = activations_torch if model.precision == "fp32" else activations_te
    kept = remade = 0.0
    for layer in layers:
        of_layer = tensors.layer_tensors(
            model, model.layer_kinds[layer], share, is_fp8=_is_fp8(model, layer)
        )
        kept += kept_bytes(of_layer, parallel.recompute)
        remade = max(remade, dropped_bytes(of_layer, parallel.recompute))
    stage = stage_layers(model, parallel).index(layers)
    total = kept * micro_batches_in_flight(parallel, stage, batch.num_micro_batches) + remade
    if layers.stop == model.num_layers:
        total += sum(x.num_bytes for x in tensors.head_tensors(model, vocab_size, share))
    return total


def _is_fp8(model: ModelConfig, layer: int) -> bool:
    ends = model.fp8_bf16_ends
    return model.precision == "fp8" and ends <= layer < model.num_layers - ends
