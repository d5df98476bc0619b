"""What the engine allocates against what `m1 plan` says of the same recipe."""

from pathlib import Path

import pytest
import torch

from m1.config.loading import load_recipe
from m1.config.schema import SamplingConfig
from m1.inference.core import EngineCore
from m1.inference.engine import LocalEngine, Request
from m1.inference.loading import limits_for
from m1.plan.report import Options, make_plan

LAPTOP = Path(__file__).parents[3] / "pipelines/recipes/laptop.toml"


def allocated(core):
    """Bytes of states, and of keys and values."""
    cache = core.cache
    states, *pages = (
        x.untyped_storage().nbytes() for x in (cache.states, cache.keys, cache.values)
    )
    return states, sum(pages)


@pytest.fixture(scope="module", params=[7, 1, 0], ids=["7 of 8", "every second", "none"])
def recipe(request):
    """The laptop recipe with so many lightning layers for each softmax layer."""
    return load_recipe([LAPTOP], overrides=[f"model.lightning_per_softmax={request.param}"])


@pytest.fixture(scope="module")
def model(recipe, make_model):
    return make_model(recipe.model, vocab_size=1024)


def test_sampling_of_rl_takes_the_states_and_pages_of_the_plan(recipe, model):
    engine = LocalEngine(model, stop_token=1023, num_tokens=1000)
    prompts = torch.randint(1000, (recipe.rl.prompts_per_step, 61)).tolist()
    seeds = tuple(range(recipe.rl.group_size))
    requests = [Request(tuple(prompt), seeds) for prompt in prompts]
    engine.generate(requests, SamplingConfig(max_new_tokens=3))
    plan = make_plan(recipe, Options(stage="rl", length=61 + 3))
    assert plan.workload.decoding.num_sequences == 256
    states, pages = allocated(engine._core)
    # One slot and one page belong to nobody; pages of 16 tokens hold one more sequence.
    assert states == pytest.approx(plan.worst.recurrent_states, rel=0.05)
    assert pages == pytest.approx(plan.worst.kv_cache, rel=0.05)


def test_a_server_takes_the_states_and_pages_of_the_plan(recipe, model):
    limits = limits_for(model, max_sequences=64, max_position=500, page_size=16)
    core = EngineCore(model, num_tokens=1000, limits=limits)
    plan = make_plan(recipe, Options(stage="rl", num_sequences=64, length=500))
    states, pages = allocated(core)
    assert states == pytest.approx(plan.worst.recurrent_states, rel=0.05)
    assert pages == pytest.approx(plan.worst.kv_cache, rel=0.05)
