"""The LM head in FP32, whatever the trunk's arithmetic (paper sec. 3.2), and the loss after it.

With a BF16 head the probabilities of training and inference modes correlated at 0.987 only.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


class HybridModel(GPTModel):  # type: ignore[misc]
    """megatron-core's GPTModel, whose cross entropy is one kernel each way on GPUs.

    The gradient overwrites the logits, which for a large vocabulary are the largest tensor of all.
    """

    def compute_language_model_loss(
        self, labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Cross entropy float32 [1, T] in nats, of targets [1, T] and logits [T, 1, V / ranks]."""
        if not (logits.is_cuda and self.config.bf16):
            return super().compute_language_model_loss(labels, logits)  # type: ignore[no-any-return]
        from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

        group = self.pg_collection.tp
        loss = parallel_cross_entropy(
            logits.contiguous(),
            labels.t().contiguous(),
            dist_process_group=group if group.size() > 1 else None,
            overwrite_input=True,
        )
        return loss.t().contiguous()  # type: ignore[no-any-return]


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
        if input_.is_cuda and input_.dtype == torch.bfloat16:
            if self.sequence_parallel:
                whole = gather_from_sequence_parallel_region(input_, group=self.tp_group)
            else:
                whole = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
            used = self.weight if given is None else given
            rows = whole.flatten(0, 1)
            logits = _SplitLinear.apply(rows, used)  # type: ignore[no-untyped-call]
            return logits.view(*whole.shape[:2], -1), None
        return super().forward(input_.float(), given, *args, **kwargs)  # type: ignore[no-any-return]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        def move_only(x: torch.Tensor) -> torch.Tensor:
            moved = fn(x)
            return x.to(moved.device) if x.dtype == torch.float32 else moved

        return super()._apply(move_only, recurse)


def split_linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """X w^T in float32 by BF16 tensor cores, without gradient: x [T, h] bfloat16, w [V, h]."""
    parts, rest = [], w
    for _ in range(3):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1].float()
    split = torch.cat(parts, dim=1)
    logits: torch.Tensor = torch.mm(x.repeat(1, 3), split.t(), out_dtype=torch.float32)
    return logits


class _SplitLinear(torch.autograd.Function):
    """x w^T in float32 by BF16 tensor cores: x [T, h] bfloat16, w [V, h] float32.

    A float32 number is the sum of three BF16 ones, and the tensor cores add up in float32, so the
    logits are those of a float32 product, at three times the cost of a BF16 one rather than
    fifteen. The gradients are products of scaled float16 numbers, whose mantissa of 10 bits is
    TF32's, summed in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return split_linear(x, w)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = ctx.saved_tensors
        grad, grad_scale = _to_half(grads[0])
        half, x_scale = _to_half(x)
        dw = torch.mm(grad.t(), half, out_dtype=torch.float32)
        half, w_scale = _to_half(w)
        dx = torch.mm(grad, half, out_dtype=torch.float32)
        return (dx / (grad_scale * w_scale)).to(x.dtype), dw.div_(grad_scale * x_scale)


def _to_half(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """X times a power of two, in float16: a mantissa as TF32 has, on products twice as fast.

    The largest element comes to lie in [2^13, 2^14); what is 2^-27 of it begins to lose bits.

    Returns:
        The scaled tensor and the scale, a float32 number on the device.
    """
    largest = torch.linalg.vector_norm(x, ord=float("inf"), dtype=torch.float32)
    scale = torch.ldexp(torch.ones_like(largest), 14 - torch.frexp(largest).exponent)
    half = torch.empty_like(x, dtype=torch.float16)
    return torch.mul(x, scale, out=half), scale


def keep_float(linear: ColumnParallelLinear) -> None:
    """Turn megatron's output layer into a `FloatHead` in place.

    In place, because its weight already carries megatron's marks (its share of the vocabulary, its
    group, being an output layer), and has its initial values.
    """
    linear.__class__ = FloatHead
    if linear.weight is not None:
        linear.weight.data = linear.weight.data.float()
