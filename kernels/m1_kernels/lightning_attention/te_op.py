"""Lightning attention as an operation of Transformer Engine, and as a module for any container.

Needs Transformer Engine and a GPU; nothing else in this package imports it. There is no matrix
product with weights here, so an FP8 recipe changes nothing inside: quantized inputs are
dequantized, and the operations around quantize what they take.

Shapes: T tokens, N sequences, H heads, D head dim.
"""

from typing import Any

import torch
from transformer_engine.pytorch.ops._common import maybe_autocast_dtype, maybe_dequantize
from transformer_engine.pytorch.ops.op import BasicOperation, OperationContext

from m1_kernels.lightning_attention import checks
from m1_kernels.lightning_attention.dispatch import gated_norm, lightning_attention_qkv
from m1_kernels.lightning_attention.ops import attention_qkv, attention_qkv_backward


class LightningAttentionOp(BasicOperation):  # type: ignore[misc]
    """Attention of a fused projection [..., 3 H D], laid out head by head as q, k, v -> [..., H D].

    The bounds of the sequences are an extra input, given to the container after its input:

        layer = te.ops.Sequential(te.ops.Linear(hidden, 3 * H * D), LightningAttentionOp(slopes, D))
        layer(x, cu_seqlens)

    All leading dimensions of the input together are the T tokens of the packing.
    """

    num_extra_inputs = 1

    def __init__(
        self, slopes: torch.Tensor, head_dim: int, *, batch_invariant: bool = False
    ) -> None:
        """Keep the decay rates.

        Args:
            slopes: float32 [H] of this rank's heads.
            head_dim: D.
            batch_invariant: As in `lightning_attention`.
        """
        super().__init__()
        self.head_dim, self.batch_invariant = head_dim, batch_invariant
        self._slopes = slopes.float()  # no buffer: a cast of the module must not touch them

    def op_forward(self, *_: Any, **__: Any) -> torch.Tensor:
        """Not used: the bounds are an extra input."""
        raise NotImplementedError("bounds are an extra input; call fuser_forward")

    def op_backward(self, *_: Any, **__: Any) -> tuple[torch.Tensor, tuple[()]]:
        """Not used, as `op_forward`."""
        raise NotImplementedError("bounds are an extra input; call fuser_backward")

    def fuser_forward(
        self,
        basic_op_ctxs: list[OperationContext],
        input_: torch.Tensor,
        *,
        basic_op_extra_inputs: list[tuple[torch.Tensor, ...]],
        **_: Any,
    ) -> tuple[torch.Tensor, list[tuple[()]]]:
        """Attend; the arguments are the containers' of Transformer Engine.

        Raises:
            ValueError: The input or the bounds cannot work.
        """
        ctx, cu_seqlens = basic_op_ctxs[0], basic_op_extra_inputs[0][0]
        x = maybe_dequantize(input_, maybe_autocast_dtype(default_dtype=input_.dtype))
        slopes = self._on(x.device)
        if x.shape[-1] != slopes.shape[0] * 3 * self.head_dim:
            raise ValueError(
                f"the input has {x.shape[-1]} features; {slopes.shape[0]} heads of {self.head_dim} "
                f"take {slopes.shape[0] * 3 * self.head_dim}: q, k and v of each"
            )
        qkv = x.view(-1, slopes.shape[0], 3, self.head_dim)
        checks.check_qkv(qkv, slopes)
        checks.check_bounds(cu_seqlens, qkv.shape[0], qkv.device)
        out, activated, entering = attention_qkv(qkv, slopes, cu_seqlens, self.batch_invariant)
        if ctx.requires_grad:
            ctx.save_for_backward(qkv, activated, cu_seqlens, entering)
            ctx.shape = input_.shape
        return out.view(*input_.shape[:-1], -1), [()]

    def fuser_backward(
        self, basic_op_ctxs: list[OperationContext], grad_output: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, list[tuple[()]], list[tuple[None]]]:
        """Gradient of the fused projection; the bounds have none."""
        ctx = basic_op_ctxs[0]
        qkv, activated, cu_seqlens, entering = ctx.saved_tensors
        d_out = maybe_dequantize(grad_output, qkv.dtype).view(-1, *activated.shape[1::2])
        d_qkv = attention_qkv_backward(
            qkv, activated, self._on(qkv.device), cu_seqlens,
            entering if entering.numel() else None, d_out, self.batch_invariant,
        )  # fmt: skip
        return d_qkv.view(ctx.shape), [()], [(None,)]

    def _on(self, device: torch.device) -> torch.Tensor:
        if self._slopes.device != device:
            self._slopes = self._slopes.to(device)
        return self._slopes


class LightningAttentionCore(torch.nn.Module):
    """A lightning layer without its projections: SiLU, attention, and the gated norm.

    It draws no random numbers and keeps no state between calls, so it can be recomputed
    (`te.checkpoint`) and placed under any RNG tracker, `te.autocast` or spec.
    """

    def __init__(
        self,
        slopes: torch.Tensor,
        head_dim: int,
        *,
        eps: float = 1e-6,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
        batch_invariant: bool = False,
    ) -> None:
        """Start with a norm's weight of ones.

        Args:
            slopes: float32 [H].
            head_dim: D.
            eps: Added to the norm's mean square.
            dtype: Of the norm's weight.
            device: Of the norm's weight.
            batch_invariant: As in `lightning_attention`.
        """
        super().__init__()
        self.head_dim, self.eps, self.batch_invariant = head_dim, eps, batch_invariant
        width = slopes.shape[0] * head_dim
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=dtype, device=device))
        self._slopes = slopes.float()

    def forward(
        self, qkv: torch.Tensor, gate: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        """sigmoid(gate) * RMSNorm(attention(SiLU(qkv))).

        Args:
            qkv: [..., 3 H D], head by head q, k and v.
            gate: [..., H D].
            cu_seqlens: int [N + 1], bounds of the T = product of leading dimensions tokens.

        Returns:
            [..., H D].
        """
        if self._slopes.device != qkv.device:
            self._slopes = self._slopes.to(qkv.device)
        split = qkv.view(-1, self._slopes.shape[0], 3, self.head_dim)
        options = {"batch_invariant": self.batch_invariant}
        out = lightning_attention_qkv(split, self._slopes, cu_seqlens, **options)
        flat = gate.reshape(-1, gate.shape[-1])
        return gated_norm(out.flatten(1), flat, self.weight, self.eps).view(gate.shape)
