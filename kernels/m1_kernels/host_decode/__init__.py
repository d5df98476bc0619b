"""A whole decoding step on a CPU, compiled by the C compiler of the machine, where there is one."""

from m1_kernels.host_decode.decode import HostModel
from m1_kernels.host_decode.sampling import Drawn, draw
from m1_kernels.host_decode.shared_library import library

__all__ = ["Drawn", "HostModel", "draw", "library"]
