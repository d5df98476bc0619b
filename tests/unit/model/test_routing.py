"""Routing replay: the trainer's experts are the given ones, its weights of them its own."""

import pytest
import torch
import torch.nn.functional as F

from m1.config.schema import ModelConfig, MoeConfig, ParallelConfig
from m1.model.build import build_model
from m1.model.packing import pack
from m1.model.routing import replaying, take_difference

T, WIDTH, EXPERTS, TOP_K = 9, 16, 5, 2
CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=WIDTH,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rotary_dim=8,
    lightning_per_softmax=1,
    moe=MoeConfig(
        num_experts=EXPERTS, top_k=TOP_K, ffn_hidden_size=12, aux_loss_coefficient=0.0
    ),
    max_position=32,
    init_std=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(make_model) -> torch.nn.Module:
    return make_model(CONFIG)


def other_experts(count: int = T, layers: int = 1, seed: int = 2) -> torch.Tensor:
    """int16 [count, layers, k], distinct in each row, whatever a router would say."""
    noise = torch.rand(count, layers, EXPERTS, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(-1)[..., :TOP_K].to(torch.int16)


def by_hand(mlp, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Sum over the given experts e of w_e fc2_e SiLU(gate_e x) up_e x, w their softmax."""
    rows = []
    for token, numbers in zip(x, experts.long().tolist(), strict=True):
        weights = (mlp.router.weight[numbers] @ token).softmax(-1)
        parts = [mlp.experts.local_experts[number] for number in numbers]
        outs = []
        for part in parts:
            gate, up = (part.linear_fc1.weight @ token).chunk(2)
            outs.append(part.linear_fc2.weight @ (F.silu(gate) * up))
        rows.append((weights[:, None] * torch.stack(outs)).sum(0))
    return torch.stack(rows)


def test_a_layer_computes_with_the_given_experts_and_its_own_weights(model):
    mlp, experts = model.decoder.layers[0].mlp, other_experts()[:, 0]
    x = torch.randn(T, WIDTH, generator=torch.Generator().manual_seed(3))
    target = torch.randn(T, WIDTH, generator=torch.Generator().manual_seed(4))
    named = dict(mlp.named_parameters())
    expected = by_hand(mlp, x, experts)
    wanted = torch.autograd.grad((expected * target).sum(), named.values(), allow_unused=True)
    with replaying(mlp.router, experts):
        found, _ = mlp(x[:, None])
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad((found[:, 0] * target).sum(), named.values(), allow_unused=True)
    for name, left, right in zip(named, gradients, wanted, strict=True):
        zeros = torch.zeros_like(named[name])
        left, right = (zeros if x is None else x for x in (left, right))
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5, msg=name)
    assert wanted[list(named).index("router.weight")].abs().max() > 0.01
    own, _ = mlp(x[:, None])
    assert (own[:, 0] - expected).abs().max() > 0.1  # it would have chosen others


def test_a_token_without_a_record_gets_the_routers_own_choice(model):
    mlp, experts = model.decoder.layers[0].mlp, other_experts()[:, 0]
    x = torch.randn(T, WIDTH, generator=torch.Generator().manual_seed(3))
    experts[::2] = -1
    with torch.no_grad():
        own = mlp(x[:, None])[0][:, 0]
        with replaying(mlp.router, experts):
            found = mlp(x[:, None])[0][:, 0]
        expected = by_hand(mlp, x[1::2], experts[1::2])
    torch.testing.assert_close(found[::2], own[::2])
    torch.testing.assert_close(found[1::2], expected, rtol=1e-5, atol=1e-6)


def test_the_difference_is_the_share_of_recorded_tokens_whose_set_differs(model):
    take_difference(model)  # what other tests counted
    mlp = model.decoder.layers[0].mlp
    x = torch.randn(T, WIDTH, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        own = (x @ mlp.router.weight.t()).topk(TOP_K).indices
        given = own.flip(1)  # another order of the same is no difference
        given[0] = torch.tensor([e for e in range(EXPERTS) if e not in own[0].tolist()][:TOP_K])
        given[1, 0] = next(e for e in range(EXPERTS) if e not in own[1].tolist())
        given[2] = -1
        with replaying(mlp.router, given.to(torch.int16)):
            mlp(x[:, None])
    assert take_difference(model) == pytest.approx(2 / (T - 1))
    assert take_difference(model) is None  # counted once


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_every_layer_gets_its_own_experts_also_when_it_is_computed_again(model, recompute):
    """The gradients by a model that recomputes are those by one that does not."""
    made = build_model(
        CONFIG, vocab_size=64, seed=1, parallel=ParallelConfig(recompute=recompute)
    )  # fmt: skip
    made.load_state_dict(model.state_dict())
    lengths = torch.tensor([4, 5])
    packing = pack(lengths)
    packing.routed_experts = other_experts(layers=2)
    maps: list[torch.Tensor] = []
    for layer in made.decoder.layers:
        layer.mlp.router.register_forward_hook(lambda _, __, out: maps.append(out[1]))
    tokens = torch.arange(T)[None]
    losses = made(tokens, packing.positions[None], None, labels=tokens, packed_seq_params=packing)
    losses.sum().backward()
    assert len(maps) == (2 if recompute == "none" else 4)
    for number, layer in enumerate((0, 1, 1, 0)[: len(maps)]):
        wanted = torch.zeros(T, EXPERTS).scatter(1, packing.routed_experts[:, layer].long(), 1)
        assert torch.equal(maps[number], wanted.bool()), number


def test_dense_models_have_nothing_to_replay(make_model):
    changes = {"moe": None, "ffn_hidden_size": 24}
    assert take_difference(make_model(CONFIG.model_copy(update=changes))) is None
