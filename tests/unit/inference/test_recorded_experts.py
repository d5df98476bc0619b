"""Experts that the engine records are those that computed, however the sequence came about."""

import pytest
import torch
from engine_checks import assert_nothing_leaks, finish

from m1.config.schema import ModelConfig, MoeConfig
from m1.inference.core import EngineCore
from m1.inference.limits import EngineLimits
from m1.inference.params import SamplingParams
from m1.inference.recorded import pack_experts, unpack_experts
from m1.model.packing import pack
from m1.types import M1Error, RoutedExperts

CONFIG = ModelConfig(
    num_layers=3,
    hidden_size=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rotary_dim=8,
    lightning_per_softmax=2,
    moe=MoeConfig(num_experts=5, top_k=2, ffn_hidden_size=16),
    max_position=256,
    init_std=0.3,
)
REQUESTS = [(tuple((7 * i + 3 * j) % 60 for j in range(3 + 7 * i)), (i, i + 50)) for i in range(5)]


@pytest.fixture(scope="module")
def model(make_model) -> torch.nn.Module:
    return make_model(CONFIG)


def make(model, **limits) -> EngineCore:
    sizes = {"num_slots": 12, "num_pages": 200, "page_size": 4, "record_experts": True} | limits
    return EngineCore(model, num_tokens=60, limits=EngineLimits(**sizes))


def run(core, requests=REQUESTS):
    params = SamplingParams(max_new_tokens=14, stop_tokens=(7,))
    groups = [core.add(prompt, params, seeds) for prompt, seeds in requests]
    finish(core)
    return [sequence for group in groups for sequence in group]


def by_forward(model, tokens: tuple[int, ...]) -> torch.Tensor:
    """bool [T, layers, E] of the trainer's forward pass."""
    maps: list[torch.Tensor] = []
    hooks = [
        layer.mlp.router.register_forward_hook(lambda _, __, out: maps.append(out[1]))
        for layer in model.decoder.layers
    ]
    packing = pack(torch.tensor([len(tokens)]))
    with torch.no_grad():
        ids = torch.tensor(tokens)[None]
        model(ids, packing.positions[None], None, packed_seq_params=packing)
    for hook in hooks:
        hook.remove()
    return torch.stack(maps, 1)


def assert_recorded_as_computed(model, sequences) -> None:
    """Same weights, so rounding alone could make a difference; these seeds have none."""
    for sequence in sequences:
        known = sequence.prompt + tuple(sequence.tokens[:-1])
        found = unpack_experts(sequence.routed_experts, num_tokens=len(known), num_experts=5)
        assert found.dtype == torch.int16 and found.shape == (len(known), 3, 2)
        made = torch.zeros(len(known), 3, 5).scatter(2, found.long(), 1).bool()
        assert torch.equal(made, by_forward(model, known))


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"host_kernel": False},
        {"is_invariant": True},
        {"step_tokens": 5},
        {"num_pages": 20, "preemption": "swap"},
        {"num_pages": 20, "preemption": "recompute"},
        {"num_slots": 1},
    ],
    ids=str,
)
def test_experts_are_those_of_the_forward_pass(model, limits):
    core = make(model, **limits)
    sequences = run(core)
    assert_recorded_as_computed(model, sequences)
    assert core.scheduler.num_preemptions > 0 or "num_pages" not in limits
    assert_nothing_leaks(core)


def test_a_turn_that_goes_on_keeps_the_experts_of_the_turns_before(model):
    core = make(model, prefix_bytes=1 << 20)
    (first,) = run(core, [(REQUESTS[3][0], (1,))])
    reply = (*first.prompt, *first.tokens, 3, 1, 4)
    sequences = run(core, [(reply, (2, 3))])
    assert core.scheduler.prefixes.hits == 1
    assert_recorded_as_computed(model, sequences)


def test_nothing_is_recorded_unless_it_is_asked_for(model):
    core = make(model, record_experts=False)
    before = core.cache.num_bytes
    assert all(sequence.routed_experts is None for sequence in run(core))
    assert make(model).cache.num_bytes - before == 201 * 4 * 3 * 2 * 2


def test_a_dense_model_has_none_to_record(make_model):
    dense = make_model(CONFIG.model_copy(update={"moe": None, "ffn_hidden_size": 24}))
    with pytest.raises(M1Error, match=r"layers are dense; turn record_experts off"):
        make(dense)


def test_records_travel_and_broken_ones_are_named():
    experts = torch.tensor([[[0, 4]], [[3, 258]]], dtype=torch.int16)
    packed = pack_experts(experts)
    # little-endian: 0, 4, 3, 0x0102
    assert packed == RoutedExperts("AAAEAAMAAgE=", num_layers=1, top_k=2)
    assert torch.equal(unpack_experts(packed, num_tokens=2, num_experts=259), experts)
    with pytest.raises(M1Error, match="recorded 8 bytes of experts, but 3 tokens by 1"):
        unpack_experts(packed, num_tokens=3, num_experts=259)
    with pytest.raises(M1Error, match=r"experts 0 to 258, but the model has 0 to 257"):
        unpack_experts(packed, num_tokens=2, num_experts=258)
