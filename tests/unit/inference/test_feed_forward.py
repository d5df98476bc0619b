"""The engine's feed-forward against the modules that train."""

import pytest
import torch

from m1.config.schema import ModelConfig, MoeConfig
from m1.inference import feed_forward
from m1.inference.feed_forward import experts
from m1.inference.invariant import invariant_linear
from m1.inference.parameters import copy_joined, read_parameters

COMMON = {
    "num_layers": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "rotary_dim": 16,
    "init_std": 0.3,
}
MODELS = {
    "few experts": {"moe": MoeConfig(num_experts=4, top_k=2, ffn_hidden_size=24)},
    "many experts": {"moe": MoeConfig(num_experts=16, top_k=3, ffn_hidden_size=24)},
    "one expert": {"moe": MoeConfig(num_experts=1, top_k=1, ffn_hidden_size=24)},
    "shared expert": {
        "moe": MoeConfig(num_experts=8, top_k=2, ffn_hidden_size=24, shared_ffn_hidden_size=40)
    },
    "dense": {"ffn_hidden_size": 48},
}


@pytest.mark.parametrize("is_joined", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_the_module_computes(make_model, name, num_tokens, is_joined):
    model = make_model(ModelConfig(**COMMON, **MODELS[name]))
    found = read_parameters(model)
    if is_joined:
        copy_joined(found)
    x = torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, _ = model.decoder.layers[0].mlp(x[:, None])
        ours = experts(x, found.layers[0].mlp, top_k=found.top_k, linear=torch.nn.functional.linear)
    torch.testing.assert_close(ours, expected[:, 0], rtol=0, atol=2e-5)


def test_one_expert_at_a_time_and_all_at_once_have_the_same_bits(make_model, monkeypatch):
    """So that batch-invariant mode may choose by the number of tokens."""
    model = make_model(ModelConfig(**COMMON, **MODELS["many experts"]))
    mlp = read_parameters(model).layers[0].mlp
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    dense = experts(x, mlp, top_k=3, linear=invariant_linear)
    monkeypatch.setattr(feed_forward, "DENSE_TOKENS", 0)
    assert torch.equal(experts(x, mlp, top_k=3, linear=invariant_linear), dense)
