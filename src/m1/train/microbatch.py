"""Packed sequences with what a loss needs of them.

Shapes: T packed tokens, N sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences for one forward and backward."""

    tokens: torch.Tensor
    """int64 [T]."""
    targets: torch.Tensor
    """int64 [T], the token that each position predicts; any id where the weight is 0."""
    lengths: torch.Tensor
    """int64 [N], sequence lengths, summing to T."""
    weights: torch.Tensor
    """float32 [T], weight of each position's loss; the weights of a global batch sum to 1."""
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    """Further tensors [T] for the loss."""
    routed_experts: torch.Tensor | None = None
    """int16 [T, layers, k], experts that the model is to use (`m1.model.routing`); -1: its own."""

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "MicroBatch":
        """Apply `function` to every tensor [T, ...]; the lengths stay."""
        return replace(
            self,
            tokens=function(self.tokens),
            targets=function(self.targets),
            weights=function(self.weights),
            extras={name: function(value) for name, value in self.extras.items()},
            routed_experts=None if self.routed_experts is None else function(self.routed_experts),
        )

    def without_loss(self) -> "MicroBatch":
        """The same sequences, none of which counts in a loss or in a sum over tokens."""
        extras = dict(self.extras)
        if "loss_mask" in extras:
            extras["loss_mask"] = torch.zeros_like(extras["loss_mask"])
        routed = self.routed_experts
        return replace(
            self,
            weights=torch.zeros_like(self.weights),
            extras=extras,
            routed_experts=None if routed is None else torch.full_like(routed, -1),
        )
