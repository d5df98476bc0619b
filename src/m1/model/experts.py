"""Experts on a GPU: their activation as one kernel, and their rows counted in FP8's multiples."""

import torch
from megatron.core.transformer.moe import experts
from megatron.core.transformer.moe.moe_utils import pad_routing_map
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher

from m1_kernels.weighted_swiglu import weighted_swiglu

FP8_ROWS = 16
"""An FP8 product wants its rows in multiples of this."""


class PaddedDispatcher(MoEAllGatherTokenDispatcher):  # type: ignore[misc]
    """Gives every expert a multiple of `FP8_ROWS` rows, the added ones with weight 0.

    Without it the experts' inputs and outputs are copied to add and to drop empty rows.
    """

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the map bool [T, E] of experts, with rows added; the tensors are passed on."""
        padded = pad_routing_map(routing_map.clone(), FP8_ROWS)
        return super().dispatch_preprocess(hidden_states, padded, probs)  # type: ignore[no-any-return]


def use_our_kernels(model: torch.nn.Module, *, is_fp8: bool) -> None:
    """Make the experts of a model of Transformer Engine's modules use what is here."""
    experts.weighted_bias_swiglu_impl = _activation  # TEGroupedMLP reads it from its module
    for part in model.modules():
        dispatcher = getattr(part, "token_dispatcher", None)
        if is_fp8 and type(dispatcher) is MoEAllGatherTokenDispatcher:
            dispatcher.__class__ = PaddedDispatcher


def _activation(
    x: torch.Tensor, bias: torch.Tensor | None, weights: torch.Tensor, fp8_input_store: bool
) -> torch.Tensor:
    if bias is not None or fp8_input_store:
        raise NotImplementedError("experts have no bias and keep the activation's input")
    return weighted_swiglu(x, weights)
