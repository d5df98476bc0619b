from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from m1.config.schema import (
    DataConfig,
    EvaluateConfig,
    Mistakes,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    PretrainConfig,
    Recipe,
    RlConfig,
    SamplingConfig,
    SourceConfig,
)

MODEL = {
    "num_layers": 8,
    "hidden_size": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "rotary_dim": 16,
    "ffn_hidden_size": 128,
}
TRAIN = {
    "num_steps": 10,
    "global_batch_rows": 8,
    "micro_batch_rows": 2,
    "optimizer": {"lr": 1e-3},
}
RL = {"num_steps": 2, "prompts_per_step": 8, "group_size": 4, "optimizer": {"lr": 1e-4}}
TASK = {"name": "sums", "dataset": "chain_sum", "num_sft": 5, "num_rl": 5, "num_heldout": 5}
DATA = {"sources": [{"name": "python", "kind": "python_stdlib"}], "tasks": [TASK]}
EVALUATE = {"benchmarks": [{"name": "sums", "task": "sums"}]}
RECIPE = {
    "name": "tiny",
    "data": DATA,
    "model": MODEL,
    "pretrain": TRAIN,
    "sft": TRAIN,
    "rl": RL,
    "evaluate": EVALUATE,
    "register": {},
}


def mistakes(table: type[BaseModel], values: dict[str, Any]) -> tuple[str, ...]:
    """What the table's own validator says about the values."""
    with pytest.raises(ValidationError) as caught:
        table.model_validate(values)
    (details,) = caught.value.errors()
    assert details["loc"] == ()
    error = details["ctx"]["error"]
    assert isinstance(error, Mistakes)
    assert str(error) == "; ".join(error.texts)
    return error.texts


def test_source_without_uri_is_refused_unless_it_is_the_standard_library() -> None:
    assert mistakes(SourceConfig, {"name": "a", "kind": "folder"}) == (
        "uri is absent, but kind 'folder' reads from one; add it",
    )
    assert SourceConfig(name="a", kind="python_stdlib").uri is None


def test_s3_source_needs_an_s3_uri() -> None:
    assert mistakes(SourceConfig, {"name": "a", "kind": "s3", "uri": "/data"}) == (
        "uri is '/data', but kind 's3' needs s3://bucket/prefix; change one",
    )


def test_tasks_of_one_name_are_refused() -> None:
    assert mistakes(DataConfig, {**DATA, "tasks": [TASK, TASK]}) == (
        "tasks has several entries named 'sums', but names select tasks; rename all but one",
    )


def test_a_single_choice_among_experts_is_refused_but_a_lone_expert_is_not() -> None:
    assert mistakes(MoeConfig, {"num_experts": 4, "top_k": 1, "ffn_hidden_size": 8}) == (
        "top_k is 1 of 4 experts, but a single choice always weighs 1 after renormalisation, so "
        "the router would learn nothing; raise top_k to 2",
    )
    assert MoeConfig(num_experts=1, top_k=1, ffn_hidden_size=8).top_k == 1


def test_residual_scales_beside_alpha_or_beta_are_refused() -> None:
    for changes in ({"alpha": 2.0}, {"beta": 0.5}):
        assert mistakes(ModelConfig, {**MODEL, "residual": {}, **changes}) == (
            "residual is given beside alpha or beta, but replaces both; remove one or the other",
        )


def test_top_k_beyond_the_experts_is_refused() -> None:
    assert mistakes(MoeConfig, {"num_experts": 2, "top_k": 3, "ffn_hidden_size": 8}) == (
        "top_k is 3, but num_experts is only 2; lower top_k or add experts",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_heads": 5},
            "num_heads is 5, but must be a multiple of num_kv_heads 2; change one of them",
        ),
        (
            {"rotary_dim": 18},
            "rotary_dim is 18, but must be even and at most head_dim 16; change it",
        ),
        (
            {"rotary_dim": 7},
            "rotary_dim is 7, but must be even and at most head_dim 16; change it",
        ),
        (
            {"layer_pattern": ["softmax"]},
            "layer_pattern has 1 entries, but num_layers is 8; make them equal",
        ),
        (
            {"ffn_hidden_size": None},
            "ffn_hidden_size is absent, but a dense model needs it; add it or a [model.moe] table",
        ),
        (
            {"moe": {"num_experts": 4, "ffn_hidden_size": 8}},
            "ffn_hidden_size is 128, but [model.moe] makes every layer a mixture; remove it and "
            "set moe.ffn_hidden_size",
        ),
    ],
)
def test_inconsistent_model_is_refused(changes: dict[str, Any], message: str) -> None:
    assert mistakes(ModelConfig, {**MODEL, **changes}) == (message,)


def test_one_table_reports_all_its_inconsistencies() -> None:
    texts = mistakes(ModelConfig, {**MODEL, "num_heads": 5, "rotary_dim": 7})
    assert [text.split()[0] for text in texts] == ["num_heads", "rotary_dim"]


def test_no_pretraining_steps_need_a_checkpoint_to_start_from():
    assert mistakes(PretrainConfig, {**TRAIN, "num_steps": 0}) == (
        "num_steps is 0, but there is no start, so later stages would get random weights; raise "
        "num_steps or name a checkpoint in start",
    )
    assert PretrainConfig(**{**TRAIN, "num_steps": 0, "start": "folder"}).num_steps == 0


def test_global_batch_that_the_replicas_cannot_share_is_refused() -> None:
    assert mistakes(PretrainConfig, {**TRAIN, "parallel": {"data": 3}}) == (
        "global_batch_rows is 8, but must be a multiple of micro_batch_rows * parallel.data = 6; "
        "change one of them",
    )


def test_group_of_one_is_refused() -> None:
    assert mistakes(RlConfig, {**RL, "group_size": 1}) == (
        "group_size is 1, but advantages need at least 2 completions per task; raise it",
    )


def test_more_updates_than_prompts_are_refused() -> None:
    assert mistakes(RlConfig, {**RL, "updates_per_step": 9}) == (
        "updates_per_step is 9, but a batch of 8 prompts splits into at most that many "
        "mini-batches; lower it or raise prompts_per_step",
    )


def test_benchmarks_of_one_name_are_refused() -> None:
    assert mistakes(EvaluateConfig, {"benchmarks": EVALUATE["benchmarks"] * 2}) == (
        "benchmarks has several entries named 'sums', but names label scores; rename all but one",
    )


@pytest.mark.parametrize(
    ("task", "messages"),
    [
        (
            {"name": "products"},
            (
                "evaluate.benchmarks.0.task is 'sums', but data.tasks has products; "
                "name one that exists",
            ),
        ),
        (
            {"num_heldout": 0},
            (
                "evaluate.benchmarks.0.task is 'sums', but its num_heldout is 0; "
                "raise it or drop the benchmark",
            ),
        ),
        (
            {"num_rl": 0},
            ("rl is present, but no entry of data.tasks has num_rl > 0; add tasks for RL",),
        ),
        (
            {"num_sft": 0},
            ("sft is present, but no entry of data.tasks has num_sft > 0; add demonstrations",),
        ),
    ],
)
def test_stages_without_the_tasks_they_need_are_refused(
    task: dict[str, Any], messages: tuple[str, ...]
) -> None:
    assert mistakes(Recipe, {**RECIPE, "data": {**DATA, "tasks": [{**TASK, **task}]}}) == messages


def test_routing_is_replayed_by_a_mixture_of_experts_only() -> None:
    moe = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 32}
    replayed = {**RECIPE, "rl": {**RL, "routing_replay": "rollout"}}
    sparse = {**MODEL, "ffn_hidden_size": None, "moe": moe}
    found = Recipe.model_validate({**replayed, "model": sparse}).rl
    assert found is not None and found.routing_replay == "rollout"
    assert mistakes(Recipe, replayed) == (
        "rl.routing_replay is 'rollout', but model.moe is absent, so there is no routing; set it "
        "to 'off'",
    )


def test_recipe_without_tasks_reports_every_stage_that_needs_them() -> None:
    texts = mistakes(Recipe, {**RECIPE, "data": {"sources": DATA["sources"]}})
    assert "data.tasks has no entries" in texts[0]
    assert [text.split()[0] for text in texts] == ["evaluate.benchmarks.0.task", "rl", "sft"]


def test_recipe_without_optional_stages_needs_no_tasks() -> None:
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "data": {"sources": DATA["sources"]},
            "model": MODEL,
            "pretrain": TRAIN,
        }
    )
    assert (recipe.sft, recipe.rl, recipe.evaluate, recipe.register_) == (None, None, None, None)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0, 0.0])
def test_learning_rate_is_positive_and_finite(value: float) -> None:
    with pytest.raises(ValidationError):
        OptimizerConfig(lr=value)


@pytest.mark.parametrize("name", ["", "Tiny", "-tiny", "ti ny", "tiny/1", "t" * 42])
def test_name_that_is_unsafe_in_paths_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="should match pattern"):
        Recipe.model_validate({**RECIPE, "name": name})


def test_register_is_known_by_its_name_in_files_only() -> None:
    assert Recipe.model_validate(RECIPE).register_ is not None
    with pytest.raises(ValidationError, match="Extra inputs"):
        Recipe.model_validate({**RECIPE, "register_": {}})


def test_values_never_change_after_loading() -> None:
    recipe = Recipe.model_validate(RECIPE)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 2  # type: ignore[misc]


def test_default_pattern_is_seven_lightning_layers_then_one_softmax_layer() -> None:
    model = ModelConfig.model_validate({**MODEL, "num_layers": 16})
    assert model.layer_kinds == (("lightning",) * 7 + ("softmax",)) * 2


def test_zero_lightning_layers_make_every_layer_softmax() -> None:
    model = ModelConfig.model_validate({**MODEL, "lightning_per_softmax": 0})
    assert model.layer_kinds == ("softmax",) * 8


def test_explicit_pattern_wins() -> None:
    pattern = ("softmax", *("lightning",) * 7)
    model = ModelConfig.model_validate({**MODEL, "layer_pattern": pattern})
    assert model.layer_kinds == pattern


def test_residual_alpha_of_eighty_post_norm_layers_is_the_published_one() -> None:
    model = ModelConfig.model_validate({**MODEL, "num_layers": 80})
    assert model.residual_alpha == pytest.approx(3.5565588, abs=1e-7)


def test_residual_alpha_of_pre_norm_is_one_and_a_given_one_wins() -> None:
    assert ModelConfig.model_validate({**MODEL, "norm": "pre"}).residual_alpha == 1.0
    assert ModelConfig.model_validate({**MODEL, "alpha": 2.5}).residual_alpha == 2.5


def test_defaults_are_the_papers_reinforcement_learning_figures() -> None:
    rl = RlConfig.model_validate(RL)
    assert (rl.optimizer.beta1, rl.optimizer.beta2, rl.optimizer.epsilon) == (0.9, 0.95, 1e-15)
    assert (rl.repetition_stop.num_tokens, rl.repetition_stop.probability) == (3000, 0.99)
    assert rl.loss.clip_eps_low is None
    sampling = EvaluateConfig.model_validate(EVALUATE).sampling
    assert (sampling.temperature, sampling.top_p) == (1.0, 0.95)


@pytest.mark.parametrize("wrong", [{"top_k": -1}, {"min_p": 1.5}, {"min_p": -0.1}], ids=str)
def test_sampling_filters_out_of_range_are_refused_by_name(wrong) -> None:
    (name,) = wrong
    with pytest.raises(ValidationError, match=name):
        SamplingConfig.model_validate(wrong)


def test_sampling_filters_are_off_unless_given() -> None:
    sampling = RlConfig.model_validate(RL).sampling
    assert (sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 0, 0.0)
