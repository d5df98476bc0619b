import pytest
from pydantic import ValidationError

from m1.config.layout import layout_mistakes, stage_layers
from m1.config.schema import ModelConfig, MoeConfig, ParallelConfig

MODEL = ModelConfig(
    num_layers=8,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rotary_dim=8,
    moe=MoeConfig(num_experts=4, top_k=2, ffn_hidden_size=48),
)


def test_a_layout_that_fits_has_no_mistakes():
    fitting = ParallelConfig(tensor=2, pipeline=4, context=2, data=2, expert=4)
    assert fitting.world_size == 32 and fitting.expert_tensor_size == 1
    assert layout_mistakes(MODEL, fitting) == []


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"tensor": 4}, "tensor is 4, but must divide model.num_kv_heads 2"),
        ({"data": 3, "expert": 3}, "expert is 3, but must divide model.moe.num_experts 4"),
        ({"pipeline": 3}, "pipeline is 3, but must divide model.num_layers 8"),
        ({"pipeline": 16}, "pipeline is 16, but model.num_layers is 8, which leaves stages empty"),
        ({"pipeline": 2, "pipeline_layers": (3, 4)}, "sums to 7, but model.num_layers is 8"),
    ],
)
def test_what_does_not_fit_is_one_sentence_with_the_remedy(layout, words):
    (text,) = layout_mistakes(MODEL, ParallelConfig(**layout))
    assert words in text


def test_a_dense_model_has_no_expert_ranks():
    dense = MODEL.model_copy(update={"moe": None, "ffn_hidden_size": 48})
    (text,) = layout_mistakes(dense, ParallelConfig(data=2, expert=2))
    assert "the model is dense" in text


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"tensor": 2, "expert_tensor": 1}, "expert_tensor is 1, but without expert parallel"),
        ({"data": 2, "expert": 4}, "must divide tensor [*] context [*] data = 2"),
        ({"pipeline": 2, "pipeline_layers": (8,)}, "has 1 entries, but pipeline is 2"),
    ],
)
def test_a_layout_that_fits_no_model_is_refused(layout, words):
    with pytest.raises(ValidationError, match=words):
        ParallelConfig(**layout)


def test_stages_take_their_layers_in_order():
    assert stage_layers(MODEL, ParallelConfig(pipeline=2)) == [range(4), range(4, 8)]
    uneven = ParallelConfig(pipeline=3, pipeline_layers=(1, 5, 2))
    assert stage_layers(MODEL, uneven) == [range(1), range(1, 6), range(6, 8)]
