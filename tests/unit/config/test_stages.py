import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from m1.config.loading import load_recipe
from m1.config.schema import Recipe
from m1.config.stages import (
    STAGES,
    canonical_json,
    image_digest,
    parents_of,
    recipe_hash,
    rl_config,
    stage_hashes,
    stage_slice,
    stages_of,
)

LAPTOP = Path(__file__).parents[3] / "pipelines/recipes/laptop.toml"
ALL = frozenset(STAGES)
AFTER_PRETRAIN = frozenset({"sft", "rl", "evaluate", "register"})


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe([LAPTOP])


@pytest.fixture
def uncached_image_digest() -> Iterator[None]:
    image_digest.cache_clear()
    yield
    image_digest.cache_clear()


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("seed=77", ALL - {"sandbox"}),
        ("data.sequence_length=1234", ALL - {"sandbox"}),
        ("data.tasks.0.num_rl=7", ALL - {"sandbox"}),
        ("model.beta=0.53", ALL - {"data", "sandbox"}),
        ("pretrain.num_steps=12345", AFTER_PRETRAIN | {"pretrain"}),
        ("sft.num_steps=12345", AFTER_PRETRAIN),
        ("sandbox.num_runs=9", {"sandbox", "rl", "evaluate", "register"}),
        ("rl.group_size=37", {"rl", "evaluate", "register"}),
        ("evaluate.num_samples=37", {"evaluate"}),
        ("register.alias=best", {"register"}),
        ("storage.root=s3://elsewhere", frozenset()),
        ("storage.scratch=/tmp/elsewhere", frozenset()),
        ("tracking.uri=http://mlflow:5000", frozenset()),
        ("tracking.experiment=other", frozenset()),
        ("name=other", frozenset()),
    ],
)
def test_change_reaches_exactly_the_stages_it_can_affect(
    recipe: Recipe, override: str, changed: frozenset[str]
) -> None:
    before, after = stage_hashes(recipe), stage_hashes(load_recipe([LAPTOP], overrides=[override]))
    assert {stage for stage in ALL if before[stage] != after[stage]} == changed


def test_hash_is_sha256_of_slice_image_and_parents(recipe: Recipe) -> None:
    hashes = stage_hashes(recipe)
    dumped = recipe.model_dump(mode="json", by_alias=True)
    text = json.dumps(
        {
            "stage": "pretrain",
            "slice": {field: dumped[field] for field in ("seed", "model", "pretrain")},
            "image": image_digest(),
            "parents": {"data": hashes["data"]},
        },
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
    )
    assert hashes["pretrain"] == hashlib.sha256(text.encode()).hexdigest()


def test_order_and_spelling_of_values_do_not_change_hashes() -> None:
    spelled = load_recipe([LAPTOP], overrides=["model.beta=1", "model.init_std=0.02"])
    respelled = load_recipe([LAPTOP], overrides=["model.init_std=2e-2", "model.beta=1.0"])
    assert stage_hashes(respelled) == stage_hashes(spelled)


@pytest.mark.parametrize(
    ("absent", "parents"),
    [
        (set(), ("data", "sandbox", "pretrain", "sft", "rl")),
        ({"sft"}, ("data", "sandbox", "pretrain", "rl")),
        ({"rl"}, ("data", "sandbox", "pretrain", "sft")),
        ({"sft", "sandbox", "rl"}, ("data", "pretrain")),
    ],
)
def test_parents_absent_from_the_recipe_are_left_out(
    recipe: Recipe, absent: set[str], parents: tuple[str, ...]
) -> None:
    smaller = recipe.model_copy(update=dict.fromkeys(absent))
    assert parents_of("evaluate", smaller) == parents
    assert stages_of(smaller) == tuple(stage for stage in STAGES if stage not in absent)
    assert tuple(stage_hashes(smaller)) == stages_of(smaller)


def test_removing_a_stage_changes_its_descendants(recipe: Recipe) -> None:
    before = stage_hashes(recipe)
    after = stage_hashes(recipe.model_copy(update={"sft": None}))
    changed = {stage for stage in after if before[stage] != after[stage]}
    assert changed == {"rl", "evaluate", "register"}


def test_registration_can_be_left_out(recipe: Recipe) -> None:
    assert "register" in stages_of(recipe)
    assert "register" not in stages_of(recipe.model_copy(update={"register_": None}))


def test_parents_run_before_their_children() -> None:
    order = list(STAGES)
    for stage, spec in STAGES.items():
        assert all(order.index(parent) < order.index(stage) for parent in spec.parents)


def test_slice_holds_only_the_declared_fields(recipe: Recipe) -> None:
    for stage, spec in STAGES.items():
        assert tuple(stage_slice(stage, recipe)) == spec.fields


def test_recipe_hash_leaves_out_where_the_run_is_kept(recipe: Recipe) -> None:
    moved = load_recipe([LAPTOP], overrides=["storage.root=s3://m1", "tracking.experiment=other"])
    assert recipe_hash(moved) == recipe_hash(recipe)


def test_recipe_hash_changes_with_what_is_computed(recipe: Recipe) -> None:
    assert recipe_hash(load_recipe([LAPTOP], overrides=["rl.group_size=37"])) != recipe_hash(recipe)


def test_canonical_json_is_one_text_for_one_value() -> None:
    assert canonical_json({"b": [1, 2.5], "a": "é"}) == '{"a":"é","b":[1,2.5]}'


@pytest.mark.usefixtures("uncached_image_digest")
def test_given_image_digest_wins_and_changes_every_stage(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("M1_IMAGE_DIGEST", raising=False)
    assert image_digest().startswith("source:")
    before = stage_hashes(recipe)
    image_digest.cache_clear()
    monkeypatch.setenv("M1_IMAGE_DIGEST", "sha256:abc")
    assert image_digest() == "sha256:abc"
    after = stage_hashes(recipe)
    assert all(before[stage] != after[stage] for stage in STAGES)


LENGTHS = [
    {"max_new_tokens": 16, "min_steps": 1, "max_steps": 5},
    {"max_new_tokens": 32, "min_steps": 1, "max_steps": 9, "clip_eps_high": 2.0},
    {"max_new_tokens": 128, "min_steps": 1, "max_steps": 3, "max_grad_norm": 0.25},
]


def with_lengths(recipe: Recipe, lengths: list[dict[str, float]]) -> Recipe:
    dumped = recipe.model_dump(by_alias=True)
    dumped["rl"]["lengths"] = lengths
    return Recipe.model_validate(dumped)


def test_every_length_is_a_stage_that_follows_the_one_before(recipe: Recipe) -> None:
    longer = with_lengths(recipe, LENGTHS)
    chain = ("rl_16", "rl_32", "rl_128")
    before = ("data", "sandbox", "pretrain", "sft")
    assert stages_of(longer) == (*before, *chain, "evaluate", "register")
    assert parents_of("rl_16", longer) == before
    assert parents_of("rl_128", longer) == (*before, "rl_32")
    assert parents_of("evaluate", longer) == (*before, *chain)


def test_a_length_changes_itself_and_what_follows_only(recipe: Recipe) -> None:
    before = stage_hashes(with_lengths(recipe, LENGTHS))
    changed = [LENGTHS[0], {**LENGTHS[1], "max_steps": 10}, LENGTHS[2]]
    after = stage_hashes(with_lengths(recipe, changed))
    differing = {stage for stage in before if before[stage] != after[stage]}
    assert differing == {"rl_32", "rl_128", "evaluate", "register"}


def test_a_longer_chain_leaves_the_stages_before_it_alone(recipe: Recipe) -> None:
    short, long = (stage_hashes(with_lengths(recipe, LENGTHS[:n])) for n in (2, 3))
    assert {s for s in short if short[s] != long[s]} == {"evaluate", "register"}


def test_a_length_has_its_own_values_and_those_of_rl_elsewhere(recipe: Recipe) -> None:
    longer = with_lengths(recipe, LENGTHS)
    assert longer.rl is not None
    second, third = (rl_config(stage, longer) for stage in ("rl_32", "rl_128"))
    assert (second.num_steps, second.sampling.max_new_tokens) == (9, 32)
    assert (second.loss.clip_eps_high, third.loss.clip_eps_high) == (2.0, None)
    assert (second.optimizer.max_grad_norm, third.optimizer.max_grad_norm) == (1.0, 0.25)
    assert third.prompts_per_step == longer.rl.prompts_per_step
    assert third.lengths == longer.rl.lengths[2:]


def test_the_gate_re_runs_nothing_where_there_are_no_lengths(recipe: Recipe) -> None:
    other = load_recipe([LAPTOP], overrides=["rl.gate.window_steps=50"])
    assert stage_hashes(other) == stage_hashes(recipe)


def test_lengths_must_grow_and_name_sources_that_exist(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="goes from 32 to 16 tokens"):
        with_lengths(recipe, LENGTHS[1::-1])
    with pytest.raises(ValueError, match=r"rl\.lengths\.0\.keep_fraction names 'sudoku'"):
        with_lengths(recipe, [{**LENGTHS[0], "keep_fraction": {"sudoku": 0.5}}])
