"""AdamW in plain torch with the state layout of Transformer Engine's and Apex's FusedAdam.

megatron-core's distributed optimizer reshards exp_avg and exp_avg_sq over any layout, and expects
the step count in the parameter group; torch's own AdamW keeps a step tensor for every parameter.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW (decoupled weight decay) whose step count is its group's.

    m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;
    p <- (1 - lr wd) p - lr m / (1-b1^t) / (sqrt(v / (1-b2^t)) + eps).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **_: Any,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = int(group.get("step", 0)) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        beta1, beta2 = group["betas"]
        grad = parameter.grad.to(parameter.dtype)  # type: ignore[union-attr]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        scale = (1 - beta2 ** group["step"]) ** 0.5
        denominator = (square.sqrt() / scale).add_(group["eps"])
        parameter.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1 ** group["step"]))


def install() -> None:
    """Give megatron-core this optimizer where none of theirs can run."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    if torch.cuda.is_available() and not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = distributed.Adam = GroupStepAdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed.HAVE_APEX_OR_TE = distributed.USING_TE_OPTIMIZER = True
    distributed.USING_APEX_OPTIMIZER = False
