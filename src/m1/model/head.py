"""The LM head in FP32, whatever the trunk's arithmetic (paper sec. 3.2).

With a BF16 head the probabilities of training and inference modes correlated at 0.987 only.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear


class FloatHead(ColumnParallelLinear):  # type: ignore[misc]
    """An output layer whose weight and logits are float32.

    Casting the model to BF16, as Float16Module does, leaves it float32, so the optimizer trains the
    weight itself and keeps no second copy.
    """

    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits float32 [T, 1, V / tensor ranks] of hidden states [T, 1, hidden].

        A weight that is given, the embedding's when they are tied, is used in float32 too.
        """
        given = None if weight is None else weight.float()
        return super().forward(input_.float(), given, *args, **kwargs)  # type: ignore[no-any-return]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        def move_only(x: torch.Tensor) -> torch.Tensor:
            moved = fn(x)
            return x.to(moved.device) if x.dtype == torch.float32 else moved

        return super()._apply(move_only, recurse)


def keep_float(linear: ColumnParallelLinear) -> None:
    """Turn megatron's output layer into a `FloatHead` in place.

    In place, because its weight already carries megatron's marks (its share of the vocabulary, its
    group, being an output layer), and has its initial values.
    """
    linear.__class__ = FloatHead
    if linear.weight is not None:
        linear.weight.data = linear.weight.data.float()
