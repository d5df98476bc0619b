"""Lightning attention: o_t = q_t S_t with S_t = exp(-slope) S_{t-1} + k_t^T v_t, per head.

Packed sequences throughout: q, k, v are [T, H, D] and `cu_seqlens` marks the sequence bounds.
"""

from m1_kernels.lightning_attention.collectives import AllGather
from m1_kernels.lightning_attention.context import lightning_attention_context
from m1_kernels.lightning_attention.dispatch import (
    copy_state,
    gated_norm,
    lightning_attention,
    lightning_attention_prefill,
    lightning_attention_qkv,
    lightning_attention_step,
)
from m1_kernels.lightning_attention.slopes import lightning_slopes

__all__ = [
    "AllGather",
    "copy_state",
    "gated_norm",
    "lightning_attention",
    "lightning_attention_context",
    "lightning_attention_prefill",
    "lightning_attention_qkv",
    "lightning_attention_step",
    "lightning_slopes",
]
