"""The block of the hybrid model: scaled residuals around attention and feed-forward; its RMSNorm.

Hidden states are [T, 1, hidden], megatron's [sequence, batch, hidden] with batch 1.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.utils.checkpoint import checkpoint

from m1.config.schema import BranchScales, ResidualConfig
from m1.model.packing import SequencePacking
from m1.model.routing import replaying


@dataclass
class HybridConfig(TransformerConfig):  # type: ignore[misc]
    """megatron's configuration with the hybrid model's own numbers."""

    residual: ResidualConfig = field(default_factory=ResidualConfig)
    """Scales of the residual and of each kind of branch."""
    is_post_norm: bool = True
    """Whether the normalised input is the residual."""
    lightning_norm_epsilon: float = 1e-6
    """RMSNorm epsilon inside lightning attention."""
    slope_depth_epsilon: float = 0.0
    """Added to the L - 1 that lightning slopes divide by."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations made again in the backward pass; see `m1.config.schema.ParallelConfig`."""


class RMSNorm(torch.nn.Module):
    """RMSNorm without Transformer Engine, allowed under sequence parallelism.

    Its gradient is summed over tensor-parallel ranks by megatron's finalize_model_grads, which
    looks for the `sequence_parallel` mark on the weight.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension in float32."""
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


class HybridLayer(TransformerLayer):  # type: ignore[misc]
    """Attention and feed-forward with scaled residuals.

    Post-norm (the published model):  x <- RMS1(x); x <- alpha x + beta Attn(x); x <- RMS2(x);
    x <- alpha x + beta MoE(x): the normalised x is the residual (PAPER sec. 1).
    Pre-norm:  x <- alpha x + beta Attn(RMS1(x));  x <- alpha x + beta MoE(RMS2(x)).
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        rotary_pos_emb: torch.Tensor | None = None,
        packed_seq_params: SequencePacking | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Apply the block to [T, 1, hidden]."""
        if self.config.recompute == "full" and torch.is_grad_enabled():
            inputs = (hidden_states, rotary_pos_emb, packed_seq_params)
            return recomputed(self, self._apply_block, *inputs), None
        return self._apply_block(hidden_states, rotary_pos_emb, packed_seq_params), None

    def _apply_block(
        self,
        hidden_states: torch.Tensor,
        rotary_pos_emb: torch.Tensor | None,
        packed_seq_params: SequencePacking | None,
    ) -> torch.Tensor:
        scales: ResidualConfig = self.config.residual
        is_softmax = isinstance(self.self_attention, SelfAttention)
        normed = self.input_layernorm(hidden_states)
        branch, _ = self.self_attention(
            normed,
            attention_mask=None,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
        )
        attention_scales = scales.softmax if is_softmax else scales.lightning
        hidden_states = self._add(normed, hidden_states, branch, attention_scales)
        normed = self.pre_mlp_layernorm(hidden_states)
        if packed_seq_params is None or packed_seq_params.routed_experts is None:
            branch, _ = self.mlp(normed)
        else:
            branch = self._replayed(normed, packed_seq_params.routed_experts)
        return self._add(normed, hidden_states, branch, scales.mlp)

    def _replayed(self, x: torch.Tensor, routed_experts: torch.Tensor) -> torch.Tensor:
        """The feed-forward by given experts int16 [T of the context rank, all layers, k]."""
        count, rank = x.shape[0], parallel_state.get_tensor_model_parallel_rank()
        if count == len(routed_experts):  # else the tokens are divided among tensor ranks
            rank = 0
        own = routed_experts[rank * count : (rank + 1) * count, self.layer_number - 1]
        with replaying(self.mlp.router, own):
            branch: torch.Tensor = self.mlp(x)[0]
        return branch

    def _add(
        self,
        normed: torch.Tensor,
        unnormed: torch.Tensor,
        branch: torch.Tensor,
        scales: BranchScales,
    ) -> torch.Tensor:
        residual = normed if self.config.is_post_norm else unnormed
        if scales.beta != 1:
            branch = branch * scales.beta
        return torch.add(branch, residual, alpha=scales.alpha)


def recomputed(module: Any, function: Any, *args: Any) -> torch.Tensor:
    """Call `function`, keep only its inputs, and call it again in the backward pass.

    Under FP8 Transformer Engine's own checkpoint keeps its scaling factors out of the second pass.
    """
    if module.config.fp8:
        from transformer_engine.pytorch import checkpoint as te_checkpoint

        return te_checkpoint(function, *args, use_reentrant=False)  # type: ignore[no-any-return]
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
