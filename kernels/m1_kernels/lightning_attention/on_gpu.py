"""The Triton implementations, behind one import."""

from m1_kernels.lightning_attention.context_kernels import ContextFunction
from m1_kernels.lightning_attention.decode import attention_step
from m1_kernels.lightning_attention.gated_norm_kernels import GatedNormFunction
from m1_kernels.lightning_attention.ops import attention, attention_prefill, attention_qkv

__all__ = [
    "ContextFunction",
    "GatedNormFunction",
    "attention",
    "attention_prefill",
    "attention_qkv",
    "attention_step",
]
