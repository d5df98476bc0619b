"""Workloads of the stages, warnings, and the shape of the JSON."""

import inspect
import math
from pathlib import Path

import pytest

from m1.config.loading import load_recipe
from m1.config.schema import Recipe
from m1.inference.engine import LocalEngine
from m1.plan.report import Options, make_plan, plan_json
from m1.plan.workload import MAX_SEQUENCES, workload_of
from m1.types import M1Error

RECIPES = Path(__file__).parents[3] / "pipelines/recipes"


def with_layout(recipe: Recipe, stage: str, **changes: object) -> Recipe:
    table = getattr(recipe, stage)
    parallel = table.parallel.model_copy(update=changes)
    return recipe.model_copy(update={stage: table.model_copy(update={"parallel": parallel})})


def test_pretraining_trains_each_token_of_the_batch_once(m1_456b) -> None:
    workload = workload_of(m1_456b, "pretrain")
    assert workload.work.trained == 8192 * 8192
    assert (workload.work.sampled, workload.work.scored) == (0, 0)
    assert workload.batch.micro_batch_tokens == 2 * 8192
    assert workload.batch.num_micro_batches == 8192 // (2 * 8)


def test_rl_samples_scores_and_trains_every_completion_once(m1_456b) -> None:
    workload = workload_of(m1_456b, "rl_40960")
    tokens = 512 * 16 * 40_960
    work = workload.work
    assert (work.sampled, work.scored, work.trained) == (tokens, tokens, tokens)
    assert workload.batch.num_micro_batches == math.ceil(tokens / 16 / 2 / 98_304)
    plan = make_plan(m1_456b, Options(stage="rl_40960"))
    assert plan.cost.flops_per_step == 5 * tokens * plan.flops.forward


def test_rl_of_several_lengths_is_planned_at_the_longest(m1_456b) -> None:
    workload = workload_of(m1_456b, "rl")
    assert workload == workload_of(m1_456b, "rl_81920")
    assert workload.sequence_length == 81_920
    assert workload.num_steps == 300


def test_rl_decodes_as_many_sequences_as_the_engine_holds(m1_456b, laptop) -> None:
    limit = inspect.signature(LocalEngine).parameters["max_sequences"].default
    assert limit == MAX_SEQUENCES
    assert workload_of(m1_456b, "rl").decoding.num_sequences == limit
    assert workload_of(laptop, "rl").decoding.num_sequences == 32 * 8


def test_an_absent_stage_is_refused_with_those_there_are(laptop) -> None:
    without = laptop.model_copy(update={"sft": None})
    with pytest.raises(M1Error, match="stage is 'sft', but this recipe trains in pretrain, rl"):
        workload_of(without, "sft")
    with pytest.raises(M1Error, match="stage is 'data'"):
        workload_of(laptop, "data")


def test_a_length_of_zero_is_refused(laptop) -> None:
    with pytest.raises(M1Error, match="length is 0"):
        workload_of(laptop, "rl", length=0)


def test_a_layout_that_cannot_fit_warns_and_one_that_fits_does_not(m1_456b, laptop) -> None:
    tight = make_plan(with_layout(m1_456b, "pretrain", recompute="none"), Options())
    assert tight.worst.stage == 0
    [warning] = tight.warnings
    assert "stage 0 needs" in warning
    assert "but h800 has 79.6" in warning
    roomy = make_plan(with_layout(m1_456b, "pretrain", recompute="full"), Options())
    assert roomy.worst.peak < roomy.gpu.memory_bytes
    assert not roomy.warnings
    assert not make_plan(laptop, Options()).warnings


def test_a_plan_without_margin_warns_too(m1_456b) -> None:
    recipe = with_layout(m1_456b, "pretrain", recompute="none")
    table = recipe.pretrain.model_copy(update={"micro_batch_rows": 1})
    data = recipe.data.model_copy(update={"sequence_length": 12_288})
    plan = make_plan(recipe.model_copy(update={"pretrain": table, "data": data}), Options())
    assert 0.9 * plan.gpu.memory_bytes < plan.worst.peak < plan.gpu.memory_bytes
    [warning] = plan.warnings
    assert "leaves less than 10%" in warning


def test_json_has_its_documented_keys(m1_456b) -> None:
    found = plan_json(make_plan(m1_456b, Options()))
    assert list(found) == [
        "recipe",
        "stage",
        "layout",
        "parameters",
        "memory",
        "flops",
        "cost",
        "inference",
        "warnings",
        "notes",
    ]
    assert found["parameters"]["total"] == 456_089_655_296
    assert found["parameters"]["active"] == 45_944_920_064
    assert found["layout"]["world_size"] == 512
    assert len(found["memory"]["stages"]) == 8
    assert found["memory"]["worst"] == found["memory"]["stages"][found["memory"]["worst_stage"]]
    worst = found["memory"]["worst"]
    parts = sum(worst[name] for name in ("weights", "gradients", "optimizer", "activations"))
    assert abs(worst["peak"] - parts) <= 4  # each is rounded to a byte
    assert found["memory"]["decoding"] == {
        "num_sequences": 1,
        "length": 8192,
        "recurrent_states": 2 * 70 * 64 * 128 * 128 * 4,
        "kv_cache": 10 * (8192 + 16) * 2 * 8 * 128 * 2,
    }
    assert found["flops"]["training_per_token"] == 3 * found["flops"]["forward_per_token"]
    assert [row["length"] for row in found["inference"]["full"]["rows"]][3] == 100_000


@pytest.mark.parametrize(
    ("name", "parameters"), [("one_gpu", (2.5e8, 3.5e8)), ("one_gpu_small", (2e7, 4e7))]
)
def test_recipes_for_one_gpu_fit_one_gpu(name, parameters) -> None:
    recipe = load_recipe([RECIPES / f"{name}.toml"])
    for stage in ("pretrain", "sft", "rl"):
        plan = make_plan(recipe, Options(stage=stage, gpu="h100"))
        assert plan.cost.num_gpus == 1
        assert not plan.warnings
        assert plan.worst.peak < 60 * 2**30  # room for the process that samples
        assert parameters[0] < plan.parameters.total < parameters[1]
