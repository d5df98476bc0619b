"""Feed-forward layers of one step, dense or experts, without a host sync where few tokens come.

Shapes: T tokens, h hidden, E experts of this rank, F width of an expert, k experts of a token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from m1.inference.parameters import FeedForward

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

DENSE_TOKENS = 256
"""Up to here, without the kernels, every expert multiplies every token: no host is asked."""
FEW_TOKENS = 1024
"""Up to here the kernels for few tokens; beyond it products of whole experts are faster."""


@dataclass(frozen=True)
class Record:
    """Where the experts of the tokens go."""

    table: torch.Tensor
    """int16 [places, k]."""
    places: torch.Tensor
    """int64 [T]."""

    def write(self, chosen: torch.Tensor) -> None:
        """Keep experts [T, k] of any integer type."""
        self.table.index_copy_(0, self.places, chosen.to(self.table.dtype))


def experts(
    x: torch.Tensor,
    weights: FeedForward,
    *,
    top_k: int,
    linear: Linear,
    record: Record | None = None,
) -> torch.Tensor:
    """Sum over the chosen experts e of w_e fc2_e [SiLU(gate_e x) * up_e x], plus a shared expert.

    w: softmax over the logits of the k chosen (PAPER sec. 1), in float32. Over several ranks the
    result is this rank's part of the sum.

    Args:
        x: [T, h].
        weights: The layer's.
        top_k: k.
        linear: y = x w^T.
        record: Takes the number, among all ranks', of each expert chosen.

    Returns:
        [T, h] in x's dtype.
    """
    if weights.router is None:
        return _swiglu(x, weights.fc1[0], weights.fc2[0], None, linear)
    is_invariant = linear is not F.linear
    if weights.table is not None and (x.shape[0] <= FEW_TOKENS or is_invariant):
        from m1_kernels.routed_experts import routed_experts

        chosen = x.new_empty(x.shape[0], top_k, dtype=torch.int32)
        out = routed_experts(
            x,
            weights.router,
            weights.table,
            top_k=top_k,
            block_rows=16 if is_invariant else None,
            chosen=chosen,
        )
        if record is not None:
            record.write(chosen)
    else:
        out = _chosen(x, weights.router, weights, top_k, linear, record)
    if weights.shared is not None:
        shared = weights.shared
        out = out + _swiglu(x, shared.fc1[0], shared.fc2[0], None, linear)
    return out


def _chosen(
    x: torch.Tensor,
    router: torch.Tensor,
    weights: FeedForward,
    top_k: int,
    linear: Linear,
    record: Record | None,
) -> torch.Tensor:
    logits = linear(x.float(), router.float())
    top, chosen = logits.topk(top_k, dim=-1)
    if record is not None:
        record.write(chosen)
    share = top.softmax(-1)
    if x.shape[0] <= DENSE_TOKENS or len(weights.fc1) <= 2 * top_k:
        return _all(x, weights, torch.zeros_like(logits).scatter_(1, chosen, share), linear)
    return _routed(x, weights, chosen, share, linear)


def _swiglu(
    x: torch.Tensor,
    fc1: torch.Tensor,
    fc2: torch.Tensor,
    share: torch.Tensor | None,
    linear: Linear,
) -> torch.Tensor:
    gate, up = linear(x, fc1).chunk(2, dim=-1)
    inner = F.silu(gate) * up
    if share is not None:
        inner = (inner * share[:, None]).to(x.dtype)
    return linear(inner, fc2)


def _all(
    x: torch.Tensor, weights: FeedForward, share: torch.Tensor, linear: Linear
) -> torch.Tensor:
    """Every expert on every token; `share` [T, all experts] is 0 where it was not chosen."""
    num_local = len(weights.fc1)
    share = share[:, weights.first_expert : weights.first_expert + num_local]
    if weights.all_fc1 is not None and weights.all_fc2 is not None:
        gate, up = linear(x, weights.all_fc1).chunk(2, dim=-1)
        inner = F.silu(gate).mul_(up)
        inner.view(x.shape[0], num_local, -1).mul_(share[:, :, None])
        return linear(inner, weights.all_fc2)
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e, (fc1, fc2) in enumerate(zip(weights.fc1, weights.fc2, strict=True)):
        total += _swiglu(x, fc1, fc2, share[:, e], linear)
    return total.to(x.dtype)


def _routed(
    x: torch.Tensor,
    weights: FeedForward,
    chosen: torch.Tensor,
    share: torch.Tensor,
    linear: Linear,
) -> torch.Tensor:
    """Each expert on the tokens that chose it; reads their number on the host."""
    top_k = chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=weights.first_expert + len(weights.fc1))
    bounds = [0, *counts.cumsum(0).tolist()]
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e, (fc1, fc2) in enumerate(zip(weights.fc1, weights.fc2, strict=True)):
        number = weights.first_expert + e
        picked = order[bounds[number] : bounds[number + 1]]
        if picked.numel():
            rows = picked // top_k
            out = _swiglu(x[rows], fc1, fc2, share.flatten()[picked], linear)
            total.index_add_(0, rows, out.float())
    return total.to(x.dtype)
