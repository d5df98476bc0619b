import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from m1.data.packing import (
    PackedRow,
    PackedRows,
    pack_documents,
    pack_samples,
    token_dtype,
    write_masks,
    write_rows,
)
from m1.types import M1Error

UINT16 = np.dtype(np.uint16)
document_lists = st.lists(
    st.lists(st.integers(1, 500), max_size=70).map(lambda ids: np.array(ids, UINT16)), max_size=12
)


def packed(documents, length):
    arrays = [np.array(ids, UINT16) for ids in documents]
    rows = pack_documents(arrays, sequence_length=length, end_of_text=0)
    return [[segment.tolist() for segment in row] for row in rows]


def test_documents_are_closed_joined_and_cut():
    assert packed([[1, 2, 3], [4], [5, 6, 7, 8]], 4) == [
        [[1, 2, 3, 0]],
        [[4, 0], [5, 6]],
        [[7, 8, 0]],
    ]


@given(document_lists, st.integers(1, 40))
def test_packing_keeps_every_token_once_and_in_order(documents, length):
    rows = list(pack_documents(documents, sequence_length=length, end_of_text=0))
    flat = [int(token) for row in rows for segment in row for token in segment]
    assert flat == [int(token) for ids in documents for token in [*ids, 0]]
    sizes = [sum(map(len, row)) for row in rows]
    assert all(size == length for size in sizes[:-1])
    assert not sizes or 0 < sizes[-1] <= length
    # An end of text is only ever the last token of a segment.
    assert all(0 not in segment[:-1] for row in rows for segment in row)


def test_samples_go_first_fit_decreasing():
    # 7 -> row 0; 6 -> row 1; 4 -> row 1; 3 -> row 0; 2 -> row 2; 2 -> row 2.
    assert pack_samples([2, 4, 7, 3, 6, 2], sequence_length=10) == [[2, 3], [4, 1], [0, 5]]


@given(st.lists(st.integers(1, 50), max_size=60))
def test_the_tree_agrees_with_plain_first_fit_decreasing(lengths):
    rows: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        for row in rows:
            if sum(lengths[item] for item in row) + lengths[sample] <= 50:
                row.append(sample)
                break
        else:
            rows.append([sample])
    assert pack_samples(lengths, sequence_length=50) == rows


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="11 tokens exceed rows of 10"):
        pack_samples([3, 11], sequence_length=10)


@pytest.mark.parametrize("vocab_size", [300, 65_499, 65_500, 200_064])
def test_token_type_is_megatrons_choice(vocab_size):
    assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_files_equal_those_of_megatrons_builder(tmp_path, dtype):
    rows = [[[1, 2, 3], [4]], [[5, 6]], [[7], [8, 9], [10]]]
    arrays = [[np.array(segment, dtype) for segment in row] for row in rows]
    assert write_rows(tmp_path / "ours", arrays, dtype=np.dtype(dtype)) == 3
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for row in rows:
        for segment in row:
            builder.add_item(torch.tensor(segment))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        ours, theirs = (tmp_path / f"{name}{suffix}" for name in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()


@settings(max_examples=25)
@given(documents=document_lists.filter(len))
def test_rows_read_back_as_written(tmp_path_factory, documents):
    prefix = tmp_path_factory.mktemp("rows") / "train"
    rows = list(pack_documents(documents, sequence_length=16, end_of_text=0))
    write_rows(prefix, rows, dtype=UINT16)
    reader = PackedRows(prefix)
    assert len(reader) == len(rows)
    for number, row in enumerate(rows):
        found = reader.row(number)
        assert found.tokens.dtype == np.int64
        assert found.tokens.tolist() == np.concatenate(row).tolist()
        assert found.segment_lengths.tolist() == [len(segment) for segment in row]
        starts = found.segment_lengths.cumsum() - found.segment_lengths
        assert np.flatnonzero(~found.loss_mask).tolist() == starts.tolist()


def test_stored_masks_read_back(tmp_path):
    rows = [[np.array([1, 2, 3], UINT16), np.array([4, 5], UINT16)], [np.array([6], UINT16)]]
    masks = [[np.array([False, True, True]), np.array([False, True])], [np.array([False])]]
    write_rows(tmp_path / "train", rows, dtype=UINT16)
    write_masks(tmp_path / "train", masks)
    reader = PackedRows(tmp_path / "train")
    assert reader.row(0).loss_mask.tolist() == [False, True, True, False, True]
    assert reader.row(0).loss_mask.dtype == np.bool_
    assert reader.row(1).loss_mask.tolist() == [False]


def test_labels_are_the_next_token_inside_a_segment():
    row = PackedRow(
        np.array([1, 2, 3, 4, 5]), np.array([3, 2]), np.array([False, True, True, False, True])
    )
    labels, mask = row.labels()
    assert labels.tolist() == [2, 3, 0, 5, 0]
    assert mask.tolist() == [True, True, False, True, False]


@given(document_lists.filter(len), st.integers(1, 20))
def test_every_target_is_labelled_exactly_once(documents, length):
    for segments in pack_documents(documents, sequence_length=length, end_of_text=0):
        lengths = np.array([len(segment) for segment in segments])
        target = np.ones(lengths.sum(), bool)
        target[lengths.cumsum() - lengths] = False
        row = PackedRow(np.concatenate(segments).astype(np.int64), lengths, target)
        labels, mask = row.labels()
        assert labels[mask].tolist() == row.tokens[row.loss_mask].tolist()


def test_a_row_out_of_range_and_a_missing_file_are_refused(tmp_path):
    write_rows(tmp_path / "train", [[np.array([1], UINT16)]], dtype=UINT16)
    reader = PackedRows(tmp_path / "train")
    for number in (-1, 1):
        with pytest.raises(IndexError):
            reader.row(number)
    with pytest.raises(M1Error, match="run the data stage"):
        PackedRows(tmp_path / "absent")
