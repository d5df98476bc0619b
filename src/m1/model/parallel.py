"""Process groups of the parallel layout."""

import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from m1.config.schema import ParallelConfig
from m1.model import adam, cpu
from m1.types import M1Error


def initialize(parallel: ParallelConfig | None = None, *, seed: int = 1) -> None:
    """Join the process group and build megatron's parallel groups; harmless when already done.

    One process needs no launcher. Several are started by torchrun, whose RANK and WORLD_SIZE are
    read.

    Raises:
        M1Error: The layout does not multiply to the number of processes.
    """
    parallel = parallel or ParallelConfig()
    cpu.install()
    adam.install()
    if torch.cuda.is_available():
        _take_gpu(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(
                backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1
            )
    if parallel_state.model_parallel_is_initialized():
        return
    world = dist.get_world_size()
    if parallel.world_size != world:
        raise M1Error(
            f"parallel layout tensor {parallel.tensor} x pipeline {parallel.pipeline} x "
            f"context {parallel.context} x data {parallel.data} needs "
            f"{parallel.world_size} processes, but {world} are running; "
            "change the layout or start that many"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
    )
    model_parallel_cuda_manual_seed(seed)


def _take_gpu(local_rank: int) -> None:
    if local_rank >= torch.cuda.device_count():
        raise M1Error(
            f"the parallel layout needs at least {local_rank + 1} GPUs on this machine, which has "
            f"{torch.cuda.device_count()}; lower it, or use a machine with more"
        )
    torch.cuda.set_device(local_rank)
