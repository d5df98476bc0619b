"""Rows of tokens for training, stored as megatron-core `IndexedDataset` files (.bin and .idx).

One megatron document is one row; each of its sequences is one segment, that is a contiguous piece
of one document or one demonstration. The segment lengths of a row give its `cu_seqlens`.

A loss mask marks *targets*: `loss_mask[t]` says whether token t is to be predicted from the tokens
before it in its segment. The first token of a segment has nothing before it and is never a target.
Seen from the predicting side (`PackedRow.labels`), the last token of a segment has no label.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m1.types import M1Error

# megatron-core's `DType` codes for the three types that rows use.
_DTYPE_CODES = {np.dtype(np.uint8): 1, np.dtype(np.int32): 4, np.dtype(np.uint16): 8}


@dataclass(frozen=True)
class PackedRow:
    """One training row of T tokens."""

    tokens: NDArray[np.int64]
    """[T] token ids."""
    segment_lengths: NDArray[np.int64]
    """[N] tokens per segment; sums to T."""
    loss_mask: NDArray[np.bool_]
    """[T] true where the token is a target; false for the first token of every segment."""

    def labels(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Next token [T] and whether to train on it [T], shifted inside segments only.

        The last token of a segment has no next token: its label is 0 and its mask false.
        """
        labels = np.append(self.tokens[1:], 0)
        mask = np.append(self.loss_mask[1:], False)
        last = np.cumsum(self.segment_lengths) - 1
        labels[last] = 0
        mask[last] = False
        return labels, mask


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Smallest type for token ids, chosen as megatron-core does."""
    return np.dtype(np.uint16) if vocab_size < 65_500 else np.dtype(np.int32)


def pack_documents(
    documents: Iterable[NDArray[Any]], *, sequence_length: int, end_of_text: int
) -> Iterator[list[NDArray[Any]]]:
    """Rows of `sequence_length` tokens from documents in order, each closed by `end_of_text`.

    Every token lands in exactly one row. A document that does not fit is cut and goes on as the
    first segment of the next row; only the last row may be shorter.
    """
    row: list[NDArray[Any]] = []
    room = sequence_length
    for document in documents:
        rest = np.append(document, document.dtype.type(end_of_text))
        while len(rest):
            piece, rest = rest[:room], rest[room:]
            row.append(piece)
            room -= len(piece)
            if not room:
                yield row
                row, room = [], sequence_length
    if row:
        yield row


def pack_samples(lengths: Sequence[int], *, sequence_length: int) -> list[list[int]]:
    """Rows of sample numbers by first-fit decreasing; no sample is split, none exceeds a row.

    A tree over rows holds the most room below each node, so that the first row with enough room is
    found in log(number of rows) steps.
    """
    too_long = [length for length in lengths if length > sequence_length]
    if too_long:
        raise ValueError(f"samples of {max(too_long)} tokens exceed rows of {sequence_length}")
    num_leaves = 1 << max(0, len(lengths) - 1).bit_length()
    room = [sequence_length] * (2 * num_leaves)
    rows: list[list[int]] = [[] for _ in lengths]
    for sample in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        node = 1
        while node < num_leaves:
            node = 2 * node if room[2 * node] >= lengths[sample] else 2 * node + 1
        rows[node - num_leaves].append(sample)
        room[node] -= lengths[sample]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [row for row in rows if row]


def write_rows(
    prefix: Path, rows: Iterable[Sequence[NDArray[Any]]], *, dtype: np.dtype[Any]
) -> int:
    """Write rows of segments to `prefix`.bin and .idx and return how many there are.

    The bytes equal those of megatron-core's `IndexedDatasetBuilder`; writing them here spares the
    data stage ten seconds of importing megatron and torch.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    lengths: list[int] = []
    documents = [0]
    with _suffixed(prefix, ".bin").open("wb") as stream:
        for row in rows:
            for segment in row:
                stream.write(np.ascontiguousarray(segment, dtype).tobytes())
                lengths.append(len(segment))
            documents.append(len(lengths))
    sizes = [length * dtype.itemsize for length in lengths]
    pointers = [0, *accumulate(sizes)][: len(sizes)]
    with _suffixed(prefix, ".idx").open("wb") as stream:
        stream.write(b"MMIDIDX\x00\x00")
        stream.write(struct.pack("<QB", 1, _DTYPE_CODES[dtype]))
        stream.write(struct.pack("<QQ", len(lengths), len(documents)))
        stream.write(np.array(lengths, np.int32).tobytes())
        stream.write(np.array(pointers, np.int64).tobytes())
        stream.write(np.array(documents, np.int64).tobytes())
    return len(documents) - 1


def write_masks(prefix: Path, rows: Iterable[Sequence[NDArray[np.bool_]]]) -> None:
    """Write the loss masks of the rows at `prefix`, segment by segment, beside them."""
    masks = ([segment.astype(np.uint8) for segment in row] for row in rows)
    write_rows(_mask_prefix(prefix), masks, dtype=np.dtype(np.uint8))


class PackedRows:
    """Rows at `prefix`; without stored masks every token but the first of a segment is a target."""

    def __init__(self, prefix: Path) -> None:
        # Pulls torch, which the data stage does not need.
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        if not IndexedDataset.exists(str(prefix)):
            raise M1Error(
                f"{prefix}.bin and .idx do not exist; run the data stage, and for SFT rows give "
                "data.tasks with num_sft > 0"
            )
        self._tokens = IndexedDataset(str(prefix))
        masks = str(_mask_prefix(prefix))
        self._masks = IndexedDataset(masks) if IndexedDataset.exists(masks) else None

    def __len__(self) -> int:
        return len(self._tokens.document_indices) - 1

    def row(self, number: int) -> PackedRow:
        """Row `number`, from 0."""
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        start, end = self._tokens.document_indices[number : number + 2]
        segments = self._tokens[int(start) : int(end)]
        lengths = np.array([len(segment) for segment in segments], np.int64)
        if self._masks is None:
            loss_mask = np.ones(int(lengths.sum()), np.bool_)
            loss_mask[np.cumsum(lengths) - lengths] = False
        else:
            loss_mask = np.concatenate(self._masks[int(start) : int(end)]).astype(np.bool_)
        return PackedRow(np.concatenate(segments).astype(np.int64), lengths, loss_mask)


def _suffixed(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _mask_prefix(prefix: Path) -> Path:
    return _suffixed(prefix, "_loss_mask")
