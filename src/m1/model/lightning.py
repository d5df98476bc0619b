"""Lightning attention in the `self_attention` slot of a transformer layer.

Shapes: T packed tokens, H heads of this rank, D head dim. Hidden states are [T, 1, hidden].
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import (
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)

from m1.model.block import HybridConfig, recomputed
from m1.model.packing import SequencePacking
from m1_kernels.lightning_attention import (
    gated_norm,
    lightning_attention_context,
    lightning_attention_qkv,
    lightning_slopes,
)


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
    the published weights are, so a tensor-parallel split of its rows is a split of heads. The norm
    spans all heads: under tensor parallelism the sums of squares are added over ranks.
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
        self.tp_group, self.dp_cp_group, self.cp_group = groups.tp, groups.dp_cp, groups.cp
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
        # No buffer: a cast of the module to BF16 must not touch them.
        self._slopes = slopes[rank * self.num_heads : (rank + 1) * self.num_heads]

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
        out = self._attend(qkv.view(-1, self.num_heads, 3, self.head_dim), packed_seq_params)
        gate, _ = self.output_gate(hidden_states)
        if self.config.recompute == "selective" and torch.is_grad_enabled():
            out = recomputed(self, self._gated_norm, out, gate)
        else:
            out = self._gated_norm(out, gate)
        return self.out_proj(out)  # type: ignore[no-any-return]

    def _attend(self, qkv: torch.Tensor, packing: SequencePacking) -> torch.Tensor:
        if self._slopes.device != qkv.device:
            self._slopes = self._slopes.to(qkv.device)
        if packing.chunks is None:
            return lightning_attention_qkv(qkv, self._slopes, packing.cu_seqlens_q)
        q, k, v = F.silu(qkv).unbind(2)
        return lightning_attention_context(q, k, v, self._slopes, packing.chunks, self.cp_group)

    def _gated_norm(self, out: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        x, gate = out.flatten(1), gate.flatten(1)
        eps = self.config.lightning_norm_epsilon
        normed = gated_norm(x, gate, self.norm_weight, eps, group=self.tp_group)
        return normed.unsqueeze(1)

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
