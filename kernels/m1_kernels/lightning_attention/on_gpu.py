"""The Triton implementations, behind one import."""

from m1_kernels.lightning_attention.chunk import (
    lightning_attention_qkv_triton,
    lightning_attention_triton,
)
from m1_kernels.lightning_attention.gated_norm import GatedNormFunction

__all__ = ["GatedNormFunction", "lightning_attention_qkv_triton", "lightning_attention_triton"]
