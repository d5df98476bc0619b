"""No loss depends on how its batch is cut, ordered, packed or padded."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.config.schema import LossConfig
from m1.train.losses import Sequences, policy_loss, token_weights
from m1.train.losses.aggregation import AGGREGATIONS

# What differs between two orders of the same sums in FP32.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
NAMES = ("cispo", "reinforce", "ppo", "grpo", "dapo", "gspo")
configs = st.builds(
    LossConfig,
    name=st.sampled_from(NAMES),
    aggregation=st.sampled_from([None, *AGGREGATIONS]),
    behaviour_cap=st.sampled_from([None, 2.0]),
    kl_coefficient=st.sampled_from([0.0, 0.1]),
)
masks = st.lists(st.booleans(), max_size=6).map(lambda m: torch.tensor([*m, True]))
batches = st.lists(st.tuples(st.integers(0, 2), masks), min_size=1, max_size=8)


def completions(batch, config):
    """Float32 values of every completion, with weights of the whole batch."""
    generator = torch.Generator().manual_seed(0)
    loss_masks = [mask for _, mask in batch]
    aggregation = config.aggregation or "token_mean"
    weights = token_weights(aggregation, loss_masks, [prompt for prompt, _ in batch])
    made = []
    for mask, weight in zip(loss_masks, weights, strict=True):
        values = -3 * torch.rand(4, len(mask), generator=generator)
        names = ("logprobs", "old_logprobs", "behaviour_logprobs", "reference_logprobs")
        fields = dict(zip(names, values, strict=True))
        advantage = torch.randn(1, generator=generator).expand(len(mask))
        made.append({**fields, "advantages": advantage, "loss_mask": mask, "weights": weight})
    return made


def run(config, made, groups):
    """Loss, and the gradient on every completion, of the batch cut into these groups."""
    leaves = [fields["logprobs"].clone().requires_grad_() for fields in made]
    total = 0.0
    for group in groups:
        joined = {
            name: torch.cat([made[i][name] for i in group])
            for name in made[0]
            if name != "logprobs"
        }
        lengths = torch.tensor([len(leaves[i]) for i in group])
        index = torch.arange(len(group)).repeat_interleave(lengths)
        logprobs = torch.cat([leaves[i] for i in group])
        sequences = Sequences(index, len(group))
        loss = policy_loss(config, logprobs=logprobs, sequences=sequences, **joined).loss
        loss.backward()
        total += float(loss.detach())
    return total, [leaf.grad for leaf in leaves]


@settings(max_examples=150)
@given(batches, configs, st.randoms(use_true_random=False), st.data())
def test_micro_batches_and_order_do_not_matter(batch, config, random, data):
    made = completions(batch, config)
    order = list(range(len(batch)))
    whole, gradients = run(config, made, [order])
    random.shuffle(order)
    size = data.draw(st.integers(1, len(batch)))
    cut, found = run(config, made, [order[i : i + size] for i in range(0, len(order), size)])
    assert cut == pytest.approx(whole, rel=1e-6, abs=1e-5)
    for left, right in zip(found, gradients, strict=True):
        torch.testing.assert_close(left, right, **TOLERANCE)


@settings(max_examples=50)
@given(batches, configs, st.permutations(range(8)))
def test_permuting_completions_permutes_their_gradients(batch, config, permutation):
    order = [i for i in permutation if i < len(batch)]
    made = completions(batch, config)
    moved = completions_in_order(batch, config, made, order)
    _, gradients = run(config, made, [list(range(len(batch)))])
    _, found = run(config, moved, [list(range(len(batch)))])
    for place, number in enumerate(order):
        torch.testing.assert_close(found[place], gradients[number], **TOLERANCE)


def completions_in_order(batch, config, made, order):
    """The same completions in another order, their weights computed anew."""
    shuffled = [batch[i] for i in order]
    aggregation = config.aggregation or "token_mean"
    weights = token_weights(aggregation, [m for _, m in shuffled], [p for p, _ in shuffled])
    return [{**made[i], "weights": w} for i, w in zip(order, weights, strict=True)]


@settings(max_examples=50)
@given(batches, configs, st.integers(0, 3))
def test_padding_does_not_matter(batch, config, extra):
    made = completions(batch, config)
    whole, gradients = run(config, made, [list(range(len(batch)))])
    width = max(len(mask) for _, mask in batch) + extra
    padded = SimpleNamespace()
    for name in made[0]:
        rows = [torch.nn.functional.pad(m[name].float(), (0, width - len(m[name]))) for m in made]
        setattr(padded, name, torch.stack(rows))
    logprobs = padded.logprobs.requires_grad_()
    fields = {name: getattr(padded, name) for name in made[0] if name != "logprobs"}
    index = torch.arange(len(batch))[:, None].expand(-1, width)
    result = policy_loss(
        config,
        logprobs=logprobs,
        sequences=Sequences(index, len(batch)),
        **{**fields, "loss_mask": fields["loss_mask"].bool()},
    )
    result.loss.backward()
    assert float(result.loss.detach()) == pytest.approx(whole, rel=1e-6, abs=1e-5)
    for row, expected in zip(logprobs.grad, gradients, strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, **TOLERANCE)
        assert not row[len(expected) :].any()
