"""Decoding on a CPU in one compiled function instead of hundreds of small operations.

It serves models in FP32 on one rank, where the machine has a C compiler; `m1_kernels.host_decode`
says what it computes. Prompts go through `ModelRunner`.

Shapes: B rows that decode, R rows of logits, V vocabulary.
"""

from typing import Any

import torch

from m1.inference.cache import Cache
from m1.inference.parameters import FeedForward, Layer, Lightning, Parameters
from m1.inference.runner import ModelRunner
from m1.inference.steps import Step
from m1_kernels.host_decode import HostModel, library
from m1_kernels.lightning_attention.reference import decay_parts


class HostDecoder:
    """A `ModelRunner` whose decoding rows are computed by `HostModel`."""

    def __init__(self, runner: ModelRunner, cache: Cache) -> None:
        self._runner, self._cache = runner, cache
        self.refresh()

    @staticmethod
    def serves(parameters: Parameters) -> bool:
        """Whether a model's decoding can be computed this way here."""
        is_whole = parameters.tensor_group is None and parameters.expert_group is None
        is_plain = parameters.device.type == "cpu" and parameters.embedding.dtype == torch.float32
        return is_whole and is_plain and library() is not None

    def refresh(self) -> None:
        """Copy the weights again, after they changed."""
        found, cache = self._runner.parameters, self._cache
        config = found.config
        sizes = {
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "groups": config.num_query_groups,
            "dim": config.kv_channels,
            "rotary_dim": 2 * found.inverse_frequencies.shape[0],
            "vocab": found.head.shape[0],
            "page_size": cache.page_size,
            "is_post_norm": int(config.is_post_norm),
            "norm_epsilon": config.layernorm_epsilon,
            "inner_epsilon": config.lightning_norm_epsilon,
            "embedding": found.embedding,
            "final_norm": found.final_norm,
            "head": found.head,
            "inverse_frequencies": found.inverse_frequencies.float(),
        }
        self._model = HostModel(
            sizes,
            [
                _layer(layer, found.top_k, cache) | _record(number, cache)
                for number, layer in enumerate(found.layers)
            ],
        )

    def __call__(self, step: Step) -> torch.Tensor:
        """Logits float32 [R, V]; states and keys of all tokens enter the cache."""
        rows = step.decode
        if rows is None:
            return self._runner(step, self._cache)
        slots = rows.slots
        if isinstance(slots, slice):
            slots = torch.arange(slots.start, slots.stop)
        count = rows.count
        logits = self._model.decode(step.tokens[:count], step.positions[:count], slots, rows.pages)
        if not step.chunks:
            return logits
        return torch.cat((logits, self._runner(step.without_rows(), self._cache)))


def _layer(layer: Layer, top_k: int, cache: Cache) -> dict[str, Any]:
    attention = layer.attention
    found: dict[str, Any] = {
        "attention_alpha": layer.attention_scales.alpha,
        "attention_beta": layer.attention_scales.beta,
        "mlp_alpha": layer.mlp_scales.alpha,
        "mlp_beta": layer.mlp_scales.beta,
        "attention_norm": layer.attention_norm,
        "mlp_norm": layer.mlp_norm,
        "out": attention.out,
    }
    if isinstance(attention, Lightning):
        keep, lost = decay_parts(attention.slopes)
        found |= {
            "in_": torch.cat((attention.qkv, attention.gate)),
            "inner_norm": attention.norm,
            "keep": keep,
            "lost": lost,
            "states": cache.states[layer.cache_index],
        }
    else:
        found |= {
            "is_softmax": 1,
            "in_": attention.qkv,
            "bias": attention.bias,
            "keys": cache.keys[layer.cache_index],
            "values": cache.values[layer.cache_index],
        }
    return found | _experts(layer.mlp, top_k)


def _record(number: int, cache: Cache) -> dict[str, Any]:
    table = cache.routed_experts
    return {} if table is None else {"routed_experts": table[number]}


def _experts(weights: FeedForward, top_k: int) -> dict[str, Any]:
    dense = weights if weights.router is None else weights.shared
    found: dict[str, Any] = {}
    if dense is not None:
        shared = {"shared_fc1": dense.fc1[0], "shared_fc2": dense.fc2[0]}
        found |= {"shared_ffn": dense.fc2[0].shape[1], **shared}
    if weights.router is not None:
        found |= {
            "top_k": top_k,
            "num_experts": len(weights.fc1),
            "ffn": weights.fc2[0].shape[1],
            "router": weights.router.float(),
            "fc1": weights.fc1,
            "fc2": weights.fc2,
        }
    return found
