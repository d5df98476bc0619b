"""Bytes of each kind on a GPU, by hand for small layouts."""

import pytest

from m1.config.model_tables import ModelConfig
from m1.config.training_tables import ParallelConfig
from m1.inference.cache import Cache
from m1.inference.parameters import read_parameters
from m1.plan import activations_te
from m1.plan.activations import dropped_bytes, kept_bytes, share_of
from m1.plan.memory import (
    Batch,
    Decoding,
    StageMemory,
    decoding_bytes,
    micro_batches_in_flight,
    plan_memory,
)
from m1.plan.parameters import count_parameters

VOCAB = 192
BATCH = Batch(micro_batch_tokens=64, num_micro_batches=8)


def stages_of(
    model: ModelConfig, *, batch: Batch = BATCH, decoding: Decoding | None = None, **layout: object
) -> list[StageMemory]:
    parallel = ParallelConfig.model_validate(layout)
    return plan_memory(model, parallel, vocab_size=VOCAB, batch=batch, decoding=decoding)


def bf16(model: ModelConfig) -> ModelConfig:
    return model.model_copy(update={"precision": "bf16"})


def test_fp32_takes_4_bytes_for_weights_4_for_gradients_8_for_moments(small_model) -> None:
    total = count_parameters(small_model, VOCAB).total
    [stage] = stages_of(small_model)
    assert (stage.weights, stage.gradients, stage.optimizer) == (4 * total, 4 * total, 8 * total)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_bf16_takes_2_4_12_bytes_and_the_fp32_head_4_4_8(moe_model, precision: str) -> None:
    model = moe_model.model_copy(update={"precision": precision})
    count = count_parameters(model, VOCAB)
    trunk = count.total - count.head
    [stage] = stages_of(model)
    assert stage.weights == 2 * trunk + 4 * count.head
    assert stage.gradients == 4 * count.total
    assert stage.optimizer == 12 * trunk + 8 * count.head


def test_data_parallelism_cuts_the_optimizer_alone(dense_model) -> None:
    [one], [two] = stages_of(dense_model), stages_of(dense_model, data=2)
    assert (two.weights, two.gradients) == (one.weights, one.gradients)
    assert two.optimizer == one.optimizer / 2


def test_context_ranks_share_the_optimizer_only_beside_data_parallelism(dense_model) -> None:
    optimizers = [
        stages_of(dense_model, **layout)[0].optimizer
        for layout in ({}, {"context": 2}, {"context": 2, "data": 2})
    ]
    assert optimizers == [optimizers[0], optimizers[0], optimizers[0] / 4]


def test_experts_are_cut_by_their_own_ranks(moe_model) -> None:
    count = count_parameters(moe_model, VOCAB).by_name
    layout = {"tensor": 2, "data": 4, "expert": 4}
    [stage] = stages_of(moe_model, **layout)
    replicated = count["router"] + (2 * 4 + 1) * 32  # router; norms of 4 layers and the last
    lightning_norms = count["norms"] - (2 * 4 + 1) * 32
    cut = count["embedding"] + count["head"] + count["lightning"] + count["softmax"]
    others = replicated + (cut + lightning_norms) / 2
    assert stage.weights == 4 * (others + count["experts"] / 4)
    # 8 ranks hold 4 shares of the experts: each share is on 2, which split its moments.
    assert stage.optimizer == 8 * (others / 4 + count["experts"] / 4 / 2)


def test_expert_tensor_ranks_cut_experts_further(moe_model) -> None:
    [one] = stages_of(moe_model, tensor=2, expert=2)
    [two] = stages_of(moe_model, tensor=2, data=2, expert=2, expert_tensor=2)
    experts = count_parameters(moe_model, VOCAB).by_name["experts"]
    assert one.weights - two.weights == 4 * experts * (1 / 2 - 1 / 4)


def test_pipeline_stages_hold_their_layers_embedding_first_and_head_last(dense_model) -> None:
    stages = stages_of(dense_model, pipeline=3, pipeline_layers=(1, 2, 1))
    count = count_parameters(dense_model, VOCAB).by_name
    assert [stage.layers for stage in stages] == [1, 2, 1]
    mlp, lightning, softmax = count["mlp"] // 4, count["lightning"] // 2, count["softmax"] // 2
    norms = 2 * 32
    heads_norm = 4 * 16
    first, middle, last = (stage.weights / 4 for stage in stages)
    assert first == mlp + norms + lightning + heads_norm + count["embedding"]
    assert middle == 2 * (mlp + norms) + softmax + lightning + heads_norm
    assert last == mlp + norms + softmax + 32 + count["head"]


def test_a_tied_head_on_another_stage_is_a_copy(moe_model) -> None:
    model = moe_model.model_copy(update={"tie_embeddings": True})
    whole = sum(stage.weights for stage in stages_of(model))
    split = sum(stage.weights for stage in stages_of(model, pipeline=2))
    assert split - whole == 4 * VOCAB * 32


def test_early_stages_keep_more_micro_batches() -> None:
    parallel = ParallelConfig(pipeline=4)
    assert [micro_batches_in_flight(parallel, i, 8) for i in range(4)] == [4, 3, 2, 1]
    assert [micro_batches_in_flight(parallel, i, 2) for i in range(4)] == [2, 2, 2, 1]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_are_those_in_flight_and_one_layer_made_again(
    moe_model, recompute: str
) -> None:
    model = bf16(moe_model)
    stages = stages_of(model, pipeline=2, recompute=recompute)
    share = share_of(model, ParallelConfig(), 64)
    layers = [activations_te.layer_tensors(model, kind, share) for kind in model.layer_kinds]
    kept = [kept_bytes(tensors, recompute) for tensors in layers]
    again = [dropped_bytes(tensors, recompute) for tensors in layers]
    head = sum(x.num_bytes for x in activations_te.head_tensors(model, VOCAB, share))
    assert stages[0].activations == 2 * (kept[0] + kept[1]) + max(again[:2])
    assert stages[1].activations == kept[2] + kept[3] + max(again[2:]) + head


def test_recomputation_saves_memory_in_order_of_its_strength(m1_456b) -> None:
    sizes = []
    for recompute in ("none", "selective", "full"):
        parallel = m1_456b.pretrain.parallel.model_copy(update={"recompute": recompute})
        stages = plan_memory(m1_456b.model, parallel, vocab_size=200_064, batch=Batch(16_384, 512))
        sizes.append(stages[0].activations)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < sizes[1] < sizes[0]


def test_fp8_layers_at_the_ends_stay_bf16(moe_model) -> None:
    def kept(**changes: object) -> float:
        model = moe_model.model_copy(update={"precision": "fp8"} | changes)
        return stages_of(model)[0].activations

    assert kept() < kept(fp8_bf16_ends=1) < kept(fp8_bf16_ends=2)
    assert kept(fp8_bf16_ends=2) == stages_of(bf16(moe_model))[0].activations


def test_decoding_keeps_what_the_engine_allocates(make_model, small_model: ModelConfig) -> None:
    model = make_model(small_model, vocab_size=64)
    slots, length, page = 3, 96, 16
    cache = Cache(
        read_parameters(model),
        num_slots=slots,
        num_pages=slots * length // page,
        page_size=page,
    )
    planned = decoding_bytes(small_model, list(small_model.layer_kinds), Decoding(slots, length))
    assert cache.states.nbytes == planned[0]
    assert cache.keys.nbytes + cache.values.nbytes == planned[1]


def test_tensor_ranks_split_states_and_cache(moe_model) -> None:
    [one], [two] = (stages_of(moe_model, decoding=Decoding(2, 10), tensor=n) for n in (1, 2))
    assert two.recurrent_states == one.recurrent_states / 2 == 3 * 2 * 4 * 16 * 16 * 4 / 2
    assert two.kv_cache == one.kv_cache / 2 == (2 * 10 + 16) * 2 * 2 * 2 * 16 * 4 / 2


def test_the_cache_of_a_bf16_model_takes_half_and_its_states_as_much(moe_model) -> None:
    kinds = list(moe_model.layer_kinds)
    states, cache = decoding_bytes(moe_model, kinds, Decoding(1, 10))
    assert decoding_bytes(bf16(moe_model), kinds, Decoding(1, 10)) == (states, cache / 2)


def test_training_and_decoding_take_turns() -> None:
    stage = StageMemory(
        stage=0,
        layers=1,
        weights=1.0,
        gradients=2.0,
        optimizer=3.0,
        activations=10.0,
        recurrent_states=4.0,
        kv_cache=5.0,
    )
    assert stage.peak == 1 + 2 + 3 + 10
