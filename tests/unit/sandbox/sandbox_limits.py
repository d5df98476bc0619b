"""Bounds that the tests of all backends share."""

from m1.sandbox.base import Limits

LIMITS = Limits(cpu_seconds=5, wall_seconds=20, memory_mib=256, scratch_mib=32, num_files=4000)
