"""What the model is asked in one step: rows that decode, and chunks of prompts.

Shapes: T tokens of a step, B rows that decode, N chunks, n pages of a row, G tokens of a page, R
rows of logits.
"""

from dataclasses import dataclass, field

import torch


@dataclass
class DecodeRows:
    """Sequences that add one token each."""

    slots: torch.Tensor | slice
    """int64 [B], -1 for padding; or the range of slots that they are."""
    pages: torch.Tensor
    """int64 [B, n]."""
    lengths: torch.Tensor
    """int64 [B], tokens of each with the new one."""
    count: int
    """B."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one prompt."""

    slot: int
    start: int
    """Tokens of the prompt before it."""
    count: int
    pages: torch.Tensor
    """int64 [n], enough for start + count tokens."""


@dataclass(frozen=True)
class Prompts:
    """The chunks of a step as the kernels of lightning attention take them."""

    cu_seqlens: torch.Tensor
    """int32 [N + 1], bounds of the chunks."""
    slots: torch.Tensor
    """int64 [N]."""
    is_new: torch.Tensor | None
    """bool [N], whether a chunk is the first of its prompt; None where all are."""

    @classmethod
    def of(cls, chunks: "list[Chunk]", device: torch.device) -> "Prompts":
        """Collect what chunks say of themselves."""
        counts = torch.tensor([0, *(chunk.count for chunk in chunks)], dtype=torch.int32)
        is_new = [chunk.start == 0 for chunk in chunks]
        return cls(
            cu_seqlens=counts.cumsum(0, dtype=torch.int32).to(device),
            slots=torch.tensor([chunk.slot for chunk in chunks], device=device),
            is_new=None if all(is_new) else torch.tensor(is_new, device=device),
        )


@dataclass
class Step:
    """What the model is asked: first the rows that decode, then the chunks end to end."""

    tokens: torch.Tensor
    """int64 [T]."""
    positions: torch.Tensor
    """int64 [T]."""
    places: torch.Tensor
    """int64 [T], where in the pages each token's key goes: page * G + offset."""
    decode: DecodeRows | None = None
    chunks: list[Chunk] = field(default_factory=list)
    logits_of: torch.Tensor | None = None
    """int64 [R], tokens after which the next is wanted; None for all."""

    def without_rows(self) -> "Step":
        """The chunks alone."""
        count = self.decode.count if self.decode else 0
        return Step(
            tokens=self.tokens[count:],
            positions=self.positions[count:],
            places=self.places[count:],
            chunks=self.chunks,
            logits_of=None if self.logits_of is None else self.logits_of[count:] - count,
        )
