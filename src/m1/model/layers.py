"""Layers of the hybrid model: RMSNorm, lightning and softmax attention, the alpha/beta block.

Shapes: T packed tokens, H heads of this rank, KV key-value heads of this rank, D head dim, N
    sequences.
Hidden states are [T, 1, hidden], megatron's [sequence, batch, hidden] with batch 1.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import (
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)

from m1.config.schema import BranchScales, ResidualConfig
from m1.model.packing import LayerState, SequencePacking
from m1_kernels.lightning_attention import (
    lightning_attention,
    lightning_attention_step,
    lightning_slopes,
)


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


class RMSNorm(torch.nn.Module):
    """RMSNorm without Transformer Engine, allowed under sequence parallelism.

    Its gradient is summed over tensor-parallel ranks by megatron's finalize_model_grads, which
    looks for the
    `sequence_parallel` mark on the weight.
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


@dataclass
class LightningSubmodules:
    """Projections of a lightning layer."""

    qkv_proj: ModuleSpec | type
    output_gate: ModuleSpec | type
    out_proj: ModuleSpec | type


class LightningAttention(MegatronModule):  # type: ignore[misc]
    """Lightning attention in the `self_attention` slot of a transformer layer.

        [q|k|v]_h = SiLU(W_qkv x);  o = lightning(q, k, v)
        y = W_o [sigmoid(W_g x) * RMS(o over all heads)]

    (MiniMax-01 report; PAPER sec. 1.) The fused projection is laid out head by head as q, k, v, as
    the published
    weights are, so a tensor-parallel split of its rows is a split of heads. The norm spans all
    heads: under tensor parallelism the sums of squares are added over ranks.
    """

    def __init__(
        self,
        config: HybridConfig,
        submodules: LightningSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.tp_group, self.dp_cp_group = groups.tp, groups.dp_cp
        width = config.num_attention_heads * config.kv_channels
        num_ranks, rank = self.tp_group.size(), self.tp_group.rank()
        self.num_heads, self.head_dim = config.num_attention_heads // num_ranks, config.kv_channels
        common = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.qkv_proj = build_module(
            submodules.qkv_proj,
            config.hidden_size,
            3 * width,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="qkv",
            **common,
        )
        self.output_gate = build_module(
            submodules.output_gate,
            config.hidden_size,
            width,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="gate",
            **common,
        )
        self.out_proj = build_module(
            submodules.out_proj,
            width,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="proj",
            **common,
        )
        self.norm_weight = torch.nn.Parameter(
            torch.ones(width // num_ranks, dtype=config.params_dtype)
        )
        self.norm_weight.tensor_model_parallel = num_ranks > 1  # type: ignore[attr-defined]
        slopes = lightning_slopes(
            config.num_attention_heads,
            layer_index=layer_number - 1,
            num_layers=config.num_layers,
            depth_epsilon=config.slope_depth_epsilon,
        )
        local = slopes[rank * self.num_heads : (rank + 1) * self.num_heads]
        self.register_buffer("slopes", local, persistent=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: SequencePacking,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states: [T, 1, hidden] ([T / tensor ranks, 1, hidden] under sequence
                parallelism).
            attention_mask: Unused; causality and bounds follow from `packed_seq_params`.
            packed_seq_params: The packing.

        Returns:
            Output shaped as the input, and no bias.
        """
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = F.silu(qkv).view(-1, self.num_heads, 3, self.head_dim).unbind(2)
        out = self._attend(q, k, v, packed_seq_params)
        gate, _ = self.output_gate(hidden_states)
        out = torch.sigmoid(gate) * self._norm(out.flatten(1)).unsqueeze(1)
        return self.out_proj(out)  # type: ignore[no-any-return]

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: SequencePacking
    ) -> torch.Tensor:
        if packing.is_decode:
            assert packing.states is not None
            state = packing.states[self.layer_number].recurrent
            assert state is not None
            return lightning_attention_step(q, k, v, self.slopes, state)
        out, final = lightning_attention(
            q,
            k,
            v,
            self.slopes,
            packing.cu_seqlens_q,
            output_final_state=packing.states is not None,
        )
        if packing.states is not None:
            packing.states[self.layer_number] = LayerState(recurrent=final)
        return out

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        eps = self.config.lightning_norm_epsilon
        if self.tp_group.size() == 1:
            return F.rms_norm(x, x.shape[-1:], self.norm_weight, eps)
        square_sum = x.float().square().sum(-1, keepdim=True)
        total = _SumOverRanks.apply(square_sum, self.tp_group)  # type: ignore[no-untyped-call]
        mean = total / (x.shape[-1] * self.tp_group.size())
        return (x.float() * torch.rsqrt(mean + eps)).to(x.dtype) * self.norm_weight

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Parameters with their place in the global model."""
        sharded = make_sharded_tensors_for_checkpoint(
            {"norm_weight": self.norm_weight},
            prefix,
            {"norm_weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=self.dp_cp_group,
        )
        for name, child in self.named_children():
            sharded |= sharded_state_dict_default(
                child, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        return sharded  # type: ignore[no-any-return]


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is summed too: each rank's output depends on all square sums."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        x = x.clone()
        torch.distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grads[0].clone()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class SoftmaxAttention(SelfAttention):  # type: ignore[misc]
    """Megatron's GQA self-attention over packed sequences in plain torch, with a key-value cache.

    RoPE turns the first `rotary_dim` dimensions of each head; the scale is 1/sqrt(D).
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        rotary_pos_emb: torch.Tensor,
        packed_seq_params: SequencePacking,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states: [T, 1, hidden] ([T / tensor ranks, 1, hidden] under sequence
                parallelism).
            attention_mask: Unused; causality and bounds follow from `packed_seq_params`.
            rotary_pos_emb: Angles [max_length, 1, 1, rotary_dim] in radians.
            packed_seq_params: The packing.

        Returns:
            Output shaped as the input, and no bias.
        """
        q, k, v = (x.squeeze(1) for x in self.get_query_key_value_tensors(hidden_states))
        if isinstance(rotary_pos_emb, tuple):
            rotary_pos_emb = rotary_pos_emb[0]
        angles = rotary_pos_emb[packed_seq_params.positions].squeeze(1)
        cos, sin = angles.cos(), angles.sin()
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if packed_seq_params.is_decode:
            out = self._decode(q, k, v, packed_seq_params)
        else:
            out = self._attend(q, k, v, packed_seq_params)
        return self.linear_proj(out.flatten(1).unsqueeze(1))  # type: ignore[no-any-return]

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: SequencePacking
    ) -> torch.Tensor:
        cu_seqlens, longest = packing.cu_seqlens_q.long(), packing.max_seqlen_q
        num_sequences = cu_seqlens.numel() - 1
        slot = torch.repeat_interleave(
            torch.arange(num_sequences, device=q.device) * longest, cu_seqlens.diff()
        )
        slot = slot + packing.positions
        q, k, v = (_scatter(x, slot, num_sequences, longest) for x in (q, k, v))  # [N, len, *, D]
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        if packing.states is not None:
            packing.states[self.layer_number] = LayerState(keys=k, values=v)
        return out.transpose(1, 2).flatten(0, 1)[slot]

    def _decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: SequencePacking
    ) -> torch.Tensor:
        assert packing.states is not None
        state = packing.states[self.layer_number]
        assert state.keys is not None and state.values is not None
        rows = torch.arange(q.shape[0], device=q.device)
        state.keys[rows, packing.positions] = k
        state.values[rows, packing.positions] = v
        longest = int(packing.positions.max()) + 1
        visible = torch.arange(longest, device=q.device)[None] <= packing.positions[:, None]
        out = F.scaled_dot_product_attention(
            q.unsqueeze(2),
            state.keys[:, :longest].transpose(1, 2),
            state.values[:, :longest].transpose(1, 2),
            attn_mask=visible[:, None, None],
            enable_gqa=True,
        )
        return out.squeeze(2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on the first dimensions of each head, halves paired (x_i, x_{i + rotary_dim/2}).

    Args:
        x: [T, heads, D].
        cos: [T, 1, rotary_dim], rotary_dim <= D.
        sin: Like `cos`.
    """
    rotary_dim = cos.shape[-1]
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def _scatter(x: torch.Tensor, slot: torch.Tensor, num_rows: int, length: int) -> torch.Tensor:
    padded = x.new_zeros(num_rows * length, *x.shape[1:])
    return padded.index_copy(0, slot, x).view(num_rows, length, *x.shape[1:])


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
        scales: ResidualConfig = self.config.residual
        is_lightning = isinstance(self.self_attention, LightningAttention)
        normed = self.input_layernorm(hidden_states)
        branch, _ = self.self_attention(
            normed,
            attention_mask=attention_mask,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
        )
        attention_scales = scales.lightning if is_lightning else scales.softmax
        hidden_states = self._add(normed, hidden_states, branch, attention_scales)
        normed = self.pre_mlp_layernorm(hidden_states)
        branch, _ = self.mlp(normed)
        return self._add(normed, hidden_states, branch, scales.mlp), None

    def _add(
        self,
        normed: torch.Tensor,
        unnormed: torch.Tensor,
        branch: torch.Tensor,
        scales: BranchScales,
    ) -> torch.Tensor:
        residual = normed if self.config.is_post_norm else unnormed
        return residual * scales.alpha + branch * scales.beta
