"""Optimizer state by the names of the model's parameters, so that any layout reads any other's."""

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "non_homogeneous_layers": True,
    "singleton_local_shards": False,
}
"""How megatron writes sharded state: independent of the layout, layers by number."""


def _parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The optimizers of dense and of expert parameters; one without expert parallel ranks."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def moments(
    optimizer: MegatronOptimizer, sharded: dict[str, Any], *, is_loading: bool
) -> dict[str, Any]:
    """Main weights and moments of every parameter, with their places in the global model.

    megatron's own state dict of several optimizers can be read by as many optimizers only, and so
    under the same kind of layout; the tensors alone are named after the model's parameters.
    """
    return {
        str(number): part.sharded_state_dict(sharded, is_loading=is_loading, metadata=METADATA)[
            "param_state"
        ]
        for number, part in enumerate(_parts(optimizer))
    }


def num_updates(optimizer: MegatronOptimizer) -> int:
    """Updates made so far."""
    groups = [group for part in _parts(optimizer) for group in part.optimizer.param_groups]
    return max((int(group.get("step", 0)) for group in groups), default=0)


def load_moments(optimizer: MegatronOptimizer, moments: dict[str, Any], num_updates: int) -> None:
    """Put back what `moments` described and a checkpoint held."""
    for number, part in enumerate(_parts(optimizer)):
        own = part.state_dict()
        for group in own["optimizer"]["param_groups"]:
            group["step"] = num_updates
        own["param_state"] = moments[str(number)]
        own["param_state_sharding_type"] = METADATA["distrib_optim_sharding_type"]
        part.load_state_dict(own)


def allocate_moments(optimizer: MegatronOptimizer) -> None:
    """Moments of zero for what has not been updated yet; saving asks for them."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(parameter))
