"""Attention kernels of M1; imports torch and triton only, never m1."""
