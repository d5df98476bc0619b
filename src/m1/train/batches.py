"""From stored rows and sampled rollouts to packed micro-batches."""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from m1.data.packing import PackedRow, PackedRows
from m1.train.microbatch import MicroBatch


@dataclass(frozen=True)
class TrainSample:
    """One completion as the RL trainer sees it: prompt and completion joined.

    Position t predicts token t + 1, so all tensors have one entry less than there are tokens.
    """

    tokens: torch.Tensor
    """int64 [T], inputs."""
    targets: torch.Tensor
    """int64 [T], what each position predicts."""
    loss_mask: torch.Tensor
    """bool [T], true where the target was sampled by the policy."""
    behaviour_logprobs: torch.Tensor
    """float32 [T], log-probability under the engine that sampled; 0 outside the mask."""
    advantage: float
    prompt: int
    """Number of the prompt (group) in its batch."""
    routed_experts: torch.Tensor | None = None
    """int16 [T, layers, k], the engine's choice, where it is to be replayed."""


def row_order(num_rows: int, *, seed: int, epoch: int) -> np.ndarray:
    """Order of the rows in one epoch, a function of seed and epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def rows_of_step(num_rows: int, *, step: int, batch_rows: int, seed: int) -> list[int]:
    """Rows of update `step` (from 0): consecutive in shuffled epochs, a function of the step."""
    first = step * batch_rows
    picked = []
    for position in range(first, first + batch_rows):
        epoch, index = divmod(position, num_rows)
        picked.append(int(_cached_order(num_rows, seed, epoch)[index]))
    return picked


_orders: dict[tuple[int, int, int], np.ndarray] = {}


def _cached_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    key = (num_rows, seed, epoch)
    if key not in _orders:
        _orders.clear()
        _orders[key] = row_order(num_rows, seed=seed, epoch=epoch)
    return _orders[key]


def row_batches(
    rows: PackedRows, indices: Sequence[int], *, rows_per_micro_batch: int
) -> list[MicroBatch]:
    """Micro-batches of stored rows, weighted as a mean over all trained tokens of the batch."""
    loaded = [rows.row(i) for i in indices]
    total = sum(int(row.labels()[1].sum()) for row in loaded)
    return [
        _join_rows(loaded[i : i + rows_per_micro_batch], total)
        for i in range(0, len(loaded), rows_per_micro_batch)
    ]


def _join_rows(rows: Sequence[PackedRow], total: int) -> MicroBatch:
    labels, masks = zip(*(row.labels() for row in rows), strict=True)
    return MicroBatch(
        tokens=torch.from_numpy(np.concatenate([row.tokens for row in rows])),
        targets=torch.from_numpy(np.concatenate(labels)),
        lengths=torch.from_numpy(np.concatenate([row.segment_lengths for row in rows])),
        weights=torch.from_numpy(np.concatenate(masks)).float() / max(total, 1),
    )


def plan_micro_batches(
    sizes: Sequence[int], *, max_tokens: int, num_replicas: int = 1
) -> list[list[int]]:
    """Which samples make up each micro-batch, of at most `max_tokens` tokens if none is longer.

    One replica fills them in order. Several take turns (`Trainer.share`), so there are as many for
    each where samples suffice, and tokens are spread evenly: the largest sample first, each to the
    emptiest micro-batch.

    Args:
        sizes: Tokens of each sample.
        max_tokens: Bound of a micro-batch; a longer sample stands alone.
        num_replicas: Data-parallel ranks.

    Returns:
        Numbers of samples, every one once.
    """
    if num_replicas == 1:
        return list(_bounded(sizes, max_tokens))
    count = num_replicas * -(-sum(sizes) // (max_tokens * num_replicas))
    while True:
        plan = _spread(sizes, min(count, len(sizes)))
        if count >= len(sizes) or all(
            len(group) == 1 or sum(sizes[i] for i in group) <= max_tokens for group in plan
        ):
            return plan
        count += num_replicas


def _spread(sizes: Sequence[int], count: int) -> list[list[int]]:
    groups: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        total, number = heapq.heappop(heap)
        groups[number].append(i)
        heapq.heappush(heap, (total + sizes[i], number))
    return [sorted(group) for group in groups]


def pack_samples(
    samples: Sequence[TrainSample],
    weights: Sequence[torch.Tensor],
    *,
    plan: Sequence[Sequence[int]],
    extras: Mapping[str, Sequence[torch.Tensor]] | None = None,
) -> list[MicroBatch]:
    """The micro-batches of a plan.

    Args:
        samples: All of them.
        weights: float32 [T] of each.
        plan: From `plan_micro_batches`.
        extras: Further tensors [T] of each sample for the loss, by name.

    Returns:
        Micro-batches with the extras `loss_mask`, `advantages`, `behaviour_logprobs`, `sequence`
        (int64, number within the micro-batch), and the given ones.
    """
    return [_join_samples(samples, weights, group, extras or {}) for group in plan]


def _join_samples(
    samples: Sequence[TrainSample],
    weights: Sequence[torch.Tensor],
    group: Sequence[int],
    extras: Mapping[str, Sequence[torch.Tensor]],
) -> MicroBatch:
    chosen = [samples[i] for i in group]
    lengths = torch.tensor([s.tokens.numel() for s in chosen])
    own = {
        "loss_mask": torch.cat([s.loss_mask for s in chosen]),
        "advantages": torch.tensor([s.advantage for s in chosen]).repeat_interleave(lengths),
        "behaviour_logprobs": torch.cat([s.behaviour_logprobs for s in chosen]),
        "sequence": torch.arange(len(chosen)).repeat_interleave(lengths),
    }
    routed = [s.routed_experts for s in chosen if s.routed_experts is not None]
    given = {name: torch.cat([values[i] for i in group]) for name, values in extras.items()}
    return MicroBatch(
        tokens=torch.cat([s.tokens for s in chosen]),
        targets=torch.cat([s.targets for s in chosen]),
        lengths=lengths,
        weights=torch.cat([weights[i] for i in group]),
        extras=own | given,
        routed_experts=torch.cat(routed) if routed else None,
    )


def _bounded(sizes: Sequence[int], bound: int) -> Iterator[list[int]]:
    group: list[int] = []
    total = 0
    for i, size in enumerate(sizes):
        if group and total + size > bound:
            yield group
            group, total = [], 0
        group.append(i)
        total += size
    if group:
        yield group
