"""One micro-batch as the ranks that share it see it: padded, cut over context ranks, on the device.

Shapes: T tokens of the micro-batch, L tokens on this rank.
"""

import math
from dataclasses import dataclass

import torch

from m1.config.schema import ParallelConfig
from m1.model.packing import SequencePacking, context_indices, pack
from m1.train.microbatch import MicroBatch


@dataclass(frozen=True)
class BatchShard:
    """This rank's tokens of a micro-batch."""

    batch: MicroBatch
    """Tensors [L] on the device; padding has token 0 and weight 0."""
    packing: SequencePacking
    """The sequences as padded."""
    source: torch.Tensor
    """int64 [L] on the CPU, place of each token in the micro-batch; -1 for padding."""


def shard(
    batch: MicroBatch,
    parallel: ParallelConfig,
    *,
    context_rank: int,
    device: torch.device,
    multiple: int = 1,
) -> BatchShard:
    """Cut a micro-batch for one context-parallel rank.

    With R context ranks every sequence is padded to a multiple of 2R, and the last one further, so
    that the tokens of a rank divide among the tensor-parallel ranks and each share is a multiple of
    `multiple`. Padding follows the tokens of its sequence, so no token can see it; its weight is 0.
    """
    source, lengths = _pad(batch.lengths, parallel, multiple)
    if parallel.context > 1:
        source = source[context_indices(lengths, rank=context_rank, size=parallel.context)]
    packing = pack(lengths, context_rank=context_rank, context_size=parallel.context, device=device)
    if parallel.context == 1 and len(source) == batch.tokens.numel():
        local = batch if device.type == "cpu" else batch.map(lambda x: x.to(device))
        packing.routed_experts = local.routed_experts
        return BatchShard(local, packing, source)
    is_padding = source < 0
    place = source.clamp(min=0)

    def take(x: torch.Tensor) -> torch.Tensor:
        rows = x[place]
        rows[is_padding] = 0
        return rows.to(device)

    local = batch.map(take)
    if local.routed_experts is not None:
        local.routed_experts[is_padding.to(device)] = -1
    packing.routed_experts = local.routed_experts
    return BatchShard(local, packing, source)


def _pad(
    lengths: torch.Tensor, parallel: ParallelConfig, multiple: int
) -> tuple[torch.Tensor, torch.Tensor]:
    chunks = 2 * parallel.context if parallel.context > 1 else 1
    padded = -(-lengths // chunks) * chunks
    whole = math.lcm(chunks, parallel.context * parallel.tensor * multiple)
    padded[-1] += -int(padded.sum()) % whole
    total = int(padded.sum())
    if total == int(lengths.sum()):
        return torch.arange(total), lengths
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(padded)
    offset = torch.arange(total) - (padded.cumsum(0) - padded).repeat_interleave(padded)
    is_real = offset < lengths.repeat_interleave(padded)
    return torch.where(is_real, starts + offset, -1), padded
