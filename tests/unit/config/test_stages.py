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
