"""SwiGLU of an expert's rows times their routing weights: one pass over memory each way."""

from m1_kernels.weighted_swiglu.dispatch import weighted_swiglu

__all__ = ["weighted_swiglu"]
