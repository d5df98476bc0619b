"""Weights that a KL term holds the policy to."""

import contextlib
from collections.abc import Iterator

import torch


class Reference:
    """A copy of a model's weights in the CPU's memory."""

    @torch.no_grad()
    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._weights = {
            name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()
        }

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the model has the reference weights; afterwards its own, bit by bit."""
        own = {name: p.detach().clone() for name, p in self._model.named_parameters()}
        self._copy(self._weights)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._model.named_parameters():
            parameter.copy_(weights[name])
