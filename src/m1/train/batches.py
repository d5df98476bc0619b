"""From stored rows and sampled rollouts to packed micro-batches."""

from collections.abc import Iterator, Sequence
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


def pack_samples(
    samples: Sequence[TrainSample],
    weights: Sequence[torch.Tensor],
    *,
    max_tokens: int,
    old_logprobs: Sequence[torch.Tensor] | None = None,
) -> list[MicroBatch]:
    """Micro-batches of at most `max_tokens` tokens (a longer sample stands alone), in order."""
    batches = []
    for group in _bounded([s.tokens.numel() for s in samples], max_tokens):
        chosen = [samples[i] for i in group]
        extras = {
            "loss_mask": torch.cat([s.loss_mask for s in chosen]),
            "advantages": torch.cat([torch.full((s.tokens.numel(),), s.advantage) for s in chosen]),
        }
        if old_logprobs is not None:
            extras["old_logprobs"] = torch.cat([old_logprobs[i] for i in group])
        batches.append(
            MicroBatch(
                tokens=torch.cat([s.tokens for s in chosen]),
                targets=torch.cat([s.targets for s in chosen]),
                lengths=torch.tensor([s.tokens.numel() for s in chosen]),
                weights=torch.cat([weights[i] for i in group]),
                extras=extras,
            )
        )
    return batches


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
