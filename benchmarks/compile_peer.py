"""Compile the kernels that flash-linear-attention's tuner tries, side by side, into Triton's cache.

    python -m benchmarks.compile_peer

The tuner compiles some 170 configurations one after another when a shape is new, which takes
minutes; afterwards, with this, it only times them. Nothing is timed here, so nothing is chosen.
"""

import argparse
import multiprocessing
import os
from typing import Any

SHAPES = ((8, 1024, 64), (1, 8192, 64), (1, 8192, 8))
"""Sequences, tokens and heads: enough for every configuration that the benchmark meets."""


def compile_share(number: int, workers: int) -> None:
    """Compile every `workers`-th configuration, by running the peer with a tuner that only does so.

    A tuner takes the fastest of its configurations, so those of this worker are called fast.
    """
    import torch
    from fla.ops.simple_gla import chunk_simple_gla
    from triton.runtime.autotuner import Autotuner

    seen = 0

    def compile_one(self: Any, *args: Any, config: Any, **options: Any) -> list[float]:
        nonlocal seen
        seen += 1
        if seen % workers != number:
            return [float("inf")] * 3
        try:
            self.fn.run(*args, **(options | config.all_kwargs() | {"warmup": True}))
        except Exception as error:  # the tuner skips such configurations too
            print(f"worker {number}: {type(error).__name__}", flush=True)
            return [float("inf")] * 3
        return [1.0] * 3

    def without_disk(self: Any, key: Any, configs: Any, bench: Any) -> bool:
        bench()
        return False

    Autotuner._bench, Autotuner.check_disk_cache = compile_one, without_disk
    for batch, tokens, heads in SHAPES:
        shape = (batch, tokens, heads, 128)
        q, k, v = (torch.randn(shape, device="cuda").bfloat16().requires_grad_() for _ in range(3))
        slopes = torch.full((heads,), 0.1, device="cuda")
        out, _ = chunk_simple_gla(q, k, v, g_gamma=-slopes, scale=1.0)
        out.float().sum().backward()


def main() -> None:
    """Start the workers and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    workers = parser.parse_args().workers
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=compile_share, args=(n, workers)) for n in range(workers)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()


if __name__ == "__main__":
    main()
