import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m1.train.losses import token_weights
from m1.train.losses.aggregation import AGGREGATIONS

MASKS = [
    torch.tensor([False, True, True]),
    torch.tensor([True]),
    torch.tensor([False, False, True, True, True]),
]


def per_token(aggregation, prompts=(7, 9, 9), **settings):
    """Weight of a sampled token of each completion, of 2, 1 and 3 of them."""
    weights = token_weights(aggregation, MASKS, prompts, **settings)
    for weight, mask in zip(weights, MASKS, strict=True):
        assert torch.equal(weight > 0, mask)
    return [float(weight.max()) for weight in weights]


def test_token_mean_weighs_every_sampled_token_alike():
    assert per_token("token_mean") == pytest.approx([1 / 6, 1 / 6, 1 / 6])


def test_prompt_mean_weighs_every_prompt_alike_and_its_tokens_alike():
    # Two prompts, of 2 and of 1 + 3 tokens.
    assert per_token("prompt_mean") == pytest.approx([1 / 4, 1 / 8, 1 / 8])


def test_sample_mean_weighs_every_completion_alike():
    assert per_token("sample_mean") == pytest.approx([1 / 6, 1 / 3, 1 / 9])


def test_the_mix_lies_between_the_means_of_samples_and_tokens():
    mixed = per_token("sample_token_mix", sample_share=0.25)
    parts = zip(per_token("sample_mean"), per_token("token_mean"), strict=True)
    assert mixed == pytest.approx([0.25 * sample + 0.75 * token for sample, token in parts])


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match=r"'mean'; use one of token_mean"):
        token_weights("mean", MASKS, [0, 0, 1])


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.booleans(), max_size=6).map(lambda m: [*m, True])),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from(AGGREGATIONS),
)
def test_weights_sum_to_one_and_vanish_outside_the_mask(batch, aggregation):
    masks = [torch.tensor(mask) for _, mask in batch]
    weights = token_weights(aggregation, masks, [prompt for prompt, _ in batch])
    assert float(torch.cat(weights).sum()) == pytest.approx(1.0, abs=1e-6)
    for weight, mask in zip(weights, masks, strict=True):
        assert torch.equal(weight > 0, mask)
