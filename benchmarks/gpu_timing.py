"""Times of GPU work as replays of a CUDA graph, and the ceilings that they are held against."""

import contextlib
from collections.abc import Callable
from statistics import median

import torch


def replay_ms(work: Callable[[], object], *, replays: int = 20, inner: int = 1) -> float:
    """Median milliseconds of `work`, captured `inner` times in one graph.

    Everything that `work` allocates stays in the graph's memory. Gradients must be asked for with
    `torch.autograd.grad`, so that no replay adds to an old one.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            work()
    for _ in range(2):
        graph.replay()
    found = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / inner)
    del graph
    return median(found)


def copy_bytes_per_second(*, size: int = 1 << 31) -> float:
    """Bytes read and written each second by copies within device memory, the fastest of three.

    A memory copy, an elementwise operator of PyTorch, and a kernel whose threads move 16 bytes at
    a time: none of them is the fastest everywhere.
    """
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device="cuda").view(torch.int32)
    target = torch.empty_like(source)
    copies = [lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target)]
    with contextlib.suppress(ImportError):
        copies.append(_triton_copy(source, target))
    return max(2 * size / replay_ms(copy) * 1e3 for copy in copies)


def _triton_copy(source: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
    from benchmarks.triton_copy import BLOCK, copy_kernel

    blocks = source.numel() // BLOCK
    return lambda: copy_kernel[(blocks,)](source, target, num_warps=8)
