import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m1.data.packing import PackedRows, write_masks, write_rows
from m1.train.batches import (
    TrainSample,
    pack_samples,
    plan_micro_batches,
    row_batches,
    row_order,
    rows_of_step,
)


@given(st.integers(1, 20), st.integers(1, 25), st.integers(0, 5))
def test_every_epoch_covers_every_row_once(num_rows, batch_rows, seed):
    num_steps = -(-3 * num_rows // batch_rows)
    seen = [
        row
        for step in range(num_steps)
        for row in rows_of_step(num_rows, step=step, batch_rows=batch_rows, seed=seed)
    ]
    for epoch in range(3):
        assert sorted(seen[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_a_step_needs_no_history():
    def rows(step):
        return rows_of_step(10, step=step, batch_rows=4, seed=3)

    forward = [rows(step) for step in range(8)]
    backward = [rows(step) for step in reversed(range(8))]
    assert forward == backward[::-1]


def test_epochs_and_seeds_are_shuffled_differently():
    orders = [row_order(100, seed=s, epoch=e).tolist() for s, e in [(0, 0), (0, 1), (1, 0)]]
    assert len({tuple(order) for order in orders}) == 3


@pytest.fixture
def rows(tmp_path):
    """Row 0: segments [1 2 3] [4 5]; row 1: [6] [7 8 9 10], of which only 9 and 10 are targets."""
    segments = [[[1, 2, 3], [4, 5]], [[6], [7, 8, 9, 10]]]
    masks = [[[0, 1, 1], [0, 1]], [[0], [0, 0, 1, 1]]]
    prefix = tmp_path / "train"
    write_rows(prefix, [[np.array(s) for s in row] for row in segments], dtype=np.dtype(np.uint16))
    write_masks(prefix, [[np.array(s, bool) for s in row] for row in masks])
    return PackedRows(prefix)


def test_rows_become_labels_and_a_mean_over_trained_tokens(rows):
    (batch,) = row_batches(rows, [0, 1], rows_per_micro_batch=2)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert batch.lengths.tolist() == [3, 2, 1, 4]
    trained = [1, 1, 0, 1, 0, 0, 0, 1, 1, 0]
    torch.testing.assert_close(batch.weights, torch.tensor(trained) / 5)
    targets = batch.targets[torch.tensor(trained, dtype=torch.bool)]
    assert targets.tolist() == [2, 3, 5, 9, 10]


def test_micro_batches_keep_the_weights_of_the_whole_batch(rows):
    (whole,) = row_batches(rows, [1, 0, 1], rows_per_micro_batch=3)
    parts = row_batches(rows, [1, 0, 1], rows_per_micro_batch=2)
    assert [part.lengths.tolist() for part in parts] == [[1, 4, 3, 2], [1, 4]]
    for name in ("tokens", "targets", "lengths", "weights"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(whole, name))


def test_a_batch_without_targets_has_weight_zero(tmp_path):
    prefix = tmp_path / "train"
    write_rows(prefix, [[np.array([1]), np.array([2])]], dtype=np.dtype(np.uint16))
    (batch,) = row_batches(PackedRows(prefix), [0], rows_per_micro_batch=1)
    assert batch.weights.tolist() == [0.0, 0.0]


def train_samples(lengths):
    starts = np.cumsum([0, *lengths])
    return [
        TrainSample(
            tokens=torch.arange(start, start + length),
            targets=torch.arange(start + 1, start + length + 1),
            loss_mask=torch.arange(length) % 2 == 0,
            behaviour_logprobs=torch.zeros(length),
            advantage=float(number),
            prompt=number // 2,
        )
        for number, (start, length) in enumerate(zip(starts, lengths, strict=False))
    ]


sizes = st.lists(st.integers(1, 20), min_size=1, max_size=15)


@given(sizes, st.integers(1, 40))
def test_one_replica_fills_micro_batches_in_order_up_to_the_bound(lengths, bound):
    plan = plan_micro_batches(lengths, max_tokens=bound)
    assert [i for group in plan for i in group] == list(range(len(lengths)))
    totals = [sum(lengths[i] for i in group) for group in plan]
    assert all(t <= bound or len(g) == 1 for t, g in zip(totals, plan, strict=True))
    for total, following in zip(totals, plan[1:], strict=False):
        assert total + lengths[following[0]] > bound  # nothing more would have fitted


@given(sizes, st.integers(1, 40), st.integers(2, 4))
def test_several_replicas_get_as_many_micro_batches_each_of_much_the_same_size(
    lengths, bound, replicas
):
    plan = plan_micro_batches(lengths, max_tokens=bound, num_replicas=replicas)
    assert sorted(i for group in plan for i in group) == list(range(len(lengths)))
    assert len(plan) % replicas == 0 or len(plan) == len(lengths)
    totals = [sum(lengths[i] for i in group) for group in plan]
    assert all(t <= bound or len(g) == 1 for t, g in zip(totals, plan, strict=True))
    # The largest first, to the emptiest: no two differ by more than a sample.
    assert max(totals) - min(totals) <= max(lengths)


def test_tokens_are_spread_evenly_by_hand():
    plan = plan_micro_batches([9, 1, 5, 4, 3, 2], max_tokens=100, num_replicas=2)
    assert plan == [[0, 4], [1, 2, 3, 5]]


@given(sizes, st.integers(1, 40), st.integers(1, 3))
def test_micro_batches_hold_their_samples_and_what_belongs_to_them(lengths, bound, replicas):
    samples = train_samples(lengths)
    plan = plan_micro_batches(lengths, max_tokens=bound, num_replicas=replicas)
    weights = [sample.tokens / 11 for sample in samples]
    old = [sample.tokens / 7 for sample in samples]
    batches = pack_samples(samples, weights, plan=plan, extras={"old_logprobs": old})
    for batch, group in zip(batches, plan, strict=True):
        assert batch.lengths.tolist() == [lengths[i] for i in group]
        tokens = torch.cat([samples[i].tokens for i in group])
        assert torch.equal(batch.tokens, tokens)
        assert torch.equal(batch.targets, tokens + 1)
        assert torch.equal(batch.weights, tokens / 11)
        assert torch.equal(batch.extras["old_logprobs"], tokens / 7)
        assert torch.equal(
            batch.extras["loss_mask"], torch.cat([samples[i].loss_mask for i in group])
        )
        numbers = torch.tensor([float(i) for i in group])
        assert torch.equal(batch.extras["advantages"], numbers.repeat_interleave(batch.lengths))
        index = torch.arange(len(group)).repeat_interleave(batch.lengths)
        assert torch.equal(batch.extras["sequence"], index)


def test_a_batch_without_loss_counts_nowhere():
    samples = train_samples([3])
    (batch,) = pack_samples(samples, [torch.ones(3)], plan=[[0]])
    emptied = batch.without_loss()
    assert torch.equal(emptied.tokens, batch.tokens)
    assert not emptied.weights.any() and not emptied.extras["loss_mask"].any()
