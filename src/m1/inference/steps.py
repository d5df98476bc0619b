"""What the model is asked in one step: rows that decode, and chunks of prompts.

Shapes: T tokens of a step, B rows that decode, n pages of a row, G tokens of a page, R rows of
logits.
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
