"""Counts against the closed form of the paper and against models that megatron-core builds."""

from m1.config.model_tables import ModelConfig
from m1.plan.parameters import count_parameters


def test_the_published_model_has_456_billion_parameters_of_which_46_are_active(m1_456b) -> None:
    hidden, width, kv, vocab = 6144, 64 * 128, 8 * 128, 200_064
    lightning = 70 * (5 * hidden * width + width)
    softmax = 10 * 2 * (width + kv) * hidden
    router, norms, expert = 80 * 32 * hidden, (2 * 80 + 1) * hidden, 3 * hidden * 9216
    trunk = lightning + softmax + router + norms
    count = count_parameters(m1_456b.model, vocab)
    assert count.total == trunk + 80 * 32 * expert + 2 * vocab * hidden
    assert count.active == trunk + 80 * 2 * expert
    assert round(count.total / 1e9, 2) == 456.09
    assert round(count.active / 1e9, 2) == 45.94


def test_counts_equal_those_of_built_models(make_model, small_model: ModelConfig) -> None:
    model = make_model(small_model, vocab_size=192)
    built = sum(parameter.numel() for parameter in model.parameters())
    count = count_parameters(small_model, 192)
    assert count.total == built
    assert sum(count.by_name.values()) == built


def test_active_leaves_out_idle_experts_the_embedding_and_the_head(
    make_model, small_model: ModelConfig
) -> None:
    model = make_model(small_model, vocab_size=192)
    active = 0.0
    for name, parameter in model.named_parameters():
        if "embedding" in name or "output_layer" in name:
            continue
        is_expert = ".experts." in name
        moe = small_model.moe
        share = moe.top_k / moe.num_experts if moe and is_expert else 1
        active += share * parameter.numel()
    assert count_parameters(small_model, 192).active == active


def test_biases_are_those_of_queries_keys_and_values_of_softmax_layers(dense_model) -> None:
    biased = dense_model.model_copy(update={"qkv_bias": True})
    more = count_parameters(biased, 64).total - count_parameters(dense_model, 64).total
    assert more == 2 * (4 + 2 * 2) * 16  # two softmax layers


def test_a_tied_head_adds_no_parameters(moe_model) -> None:
    tied = count_parameters(moe_model.model_copy(update={"tie_embeddings": True}), 64)
    assert tied.head == 0
    assert tied.total == count_parameters(moe_model, 64).total - 64 * 32
