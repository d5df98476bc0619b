from collections.abc import Callable

import pytest
import torch

from m1.config.schema import ModelConfig, MoeConfig
from m1.inference.core import EngineCore
from m1.inference.limits import EngineLimits

NUM_TOKENS = 60


@pytest.fixture(scope="session")
def small_model(make_model) -> torch.nn.Module:
    """One lightning and one softmax layer, 64 tokens: a step in little more than a millisecond."""
    config = ModelConfig(
        num_layers=2,
        hidden_size=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rotary_dim=8,
        lightning_per_softmax=1,
        moe=MoeConfig(num_experts=2, top_k=2, ffn_hidden_size=16),
        max_position=256,
        init_std=0.3,
    )
    return make_model(config)


@pytest.fixture(scope="session")
def make_core() -> Callable[..., EngineCore]:
    def make(model: torch.nn.Module, *, tokenizer=None, **limits) -> EngineCore:
        sizes = {"num_slots": 8, "num_pages": 200, "page_size": 4} | limits
        return EngineCore(
            model, num_tokens=NUM_TOKENS, limits=EngineLimits(**sizes), tokenizer=tokenizer
        )

    return make
