"""How the trainer sets up megatron-core's gradients and optimizer."""

from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer

from m1.model.cpu import single_threaded


def finalize(*args: Any, **kwargs: Any) -> None:
    """Megatron's reduction of gradients, which on CPUs runs in gloo's threads."""
    with single_threaded():
        finalize_model_grads(*args, **kwargs)


def check_order(optimizer: MegatronOptimizer) -> None:
    """Raise if megatron would look up a parameter's main weight under another's place."""
    for part in optimizer.chained_optimizers:
        for parameter, (group, place) in part.model_param_group_index_map.items():
            found = part.optimizer.param_groups[group]["params"][place].numel()
            here = part._get_model_param_range_map(parameter)["param"]
            if found != here.end - here.start:
                raise RuntimeError("megatron-core orders parameters of mixed types another way")


def accumulate_in_products(module: torch.nn.Module) -> None:
    """Let Transformer Engine's products add weight gradients to the FP32 buffer themselves.

    megatron's own switch for this also asks its plain layers, which need Apex for it.
    """
    for part in module.modules():
        if hasattr(part, "fuse_wgrad_accumulation"):
            part.fuse_wgrad_accumulation = True  # type: ignore[assignment]
