"""The published model, and small ones of every kind that the plan must count."""

from pathlib import Path

import pytest

from m1.config.loading import load_recipe
from m1.config.schema import ModelConfig, MoeConfig, Recipe

RECIPES = Path(__file__).parents[3] / "pipelines/recipes"
DENSE = {"ffn_hidden_size": 40}
MOE = {"moe": MoeConfig(num_experts=4, top_k=2, ffn_hidden_size=24)}
SHARED = {"moe": MoeConfig(num_experts=6, top_k=3, ffn_hidden_size=20, shared_ffn_hidden_size=12)}


def small(**changes: object) -> ModelConfig:
    fields = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "rotary_dim": 8,
        "lightning_per_softmax": 1,
        "max_position": 256,
    }
    return ModelConfig.model_validate(fields | changes)


SMALL_MODELS = {
    "experts": small(**MOE),
    "shared expert": small(**SHARED),
    "dense": small(**DENSE),
    "tied": small(**MOE, tie_embeddings=True),
    "one key head": small(**DENSE, num_kv_heads=1, head_dim=12, rotary_dim=12),
    "every head its keys": small(**SHARED, num_kv_heads=4),
    "softmax alone": small(**DENSE, lightning_per_softmax=0),
    "lightning alone": small(**MOE, layer_pattern=("lightning",) * 4),
}


@pytest.fixture(scope="session")
def m1_456b() -> Recipe:
    return load_recipe([RECIPES / "m1_456b.toml"])


@pytest.fixture(scope="session")
def laptop() -> Recipe:
    return load_recipe([RECIPES / "laptop.toml"])


@pytest.fixture(params=SMALL_MODELS.values(), ids=SMALL_MODELS.keys())
def small_model(request: pytest.FixtureRequest) -> ModelConfig:
    config: ModelConfig = request.param
    return config


@pytest.fixture
def dense_model() -> ModelConfig:
    return SMALL_MODELS["dense"]


@pytest.fixture
def moe_model() -> ModelConfig:
    return SMALL_MODELS["experts"]
