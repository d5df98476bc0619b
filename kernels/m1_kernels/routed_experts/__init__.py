"""Experts of few tokens, for decoding: routing, grouping and products without asking the host."""

from m1_kernels.routed_experts.kernel import ExpertTable, routed_experts

__all__ = ["ExpertTable", "routed_experts"]
