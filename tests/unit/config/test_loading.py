import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from m1.config.loading import (
    RecipeError,
    json_schema,
    load_recipe,
    recipe_json,
)
from m1.config.recipe_diff import ABSENT, FieldChange, StageChange, explain_diff
from m1.config.schema import Recipe
from m1.config.stages import STAGES
from m1.types import M1Error

RECIPES = Path(__file__).parents[3] / "pipelines/recipes"
LAPTOP = RECIPES / "laptop.toml"
BASE = """
name = "tiny"

[data]
sources = [{ name = "python", kind = "python_stdlib" }]

[[data.tasks]]
name = "sums"
dataset = "chain_sum"
parameters = { min_terms = 2, max_terms = 3 }
num_sft = 5
num_rl = 5
num_heldout = 5

[[data.tasks]]
name = "products"
dataset = "products"

[model]
num_layers = 2
hidden_size = 64
num_heads = 4
num_kv_heads = 2
head_dim = 16
rotary_dim = 16
ffn_hidden_size = 128

[pretrain]
num_steps = 10
global_batch_rows = 8
micro_batch_rows = 2
optimizer = { lr = 1e-3 }

[rl]
num_steps = 2
prompts_per_step = 8
group_size = 4
optimizer = { lr = 1e-4 }

[evaluate]
benchmarks = [{ name = "sums", task = "sums" }]

[register]
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base.toml", BASE)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def mistakes(*paths: Path, overrides: tuple[str, ...] = ()) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(paths, overrides=overrides)
    return caught.value.mistakes


def value_at(recipe: Recipe, dotted: str) -> Any:
    value = json.loads(recipe_json(recipe))
    for key in dotted.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


# Files


def test_recipe_loads_with_defaults(base: Path) -> None:
    recipe = load_recipe([base])
    assert recipe.name == "tiny"
    assert recipe.seed == 1
    assert recipe.sft is None
    assert recipe.register_ is not None


def test_later_file_merges_tables_and_replaces_everything_else(base: Path, tmp_path: Path) -> None:
    above = write(
        tmp_path / "above.toml",
        "[data]\nsources = [{ name = 'mine', kind = 'folder', uri = '/texts' }]\n"
        "[rl.optimizer]\nbeta2 = 0.99\n[rl.loss]\nclip_eps_high = 2.0\n",
    )
    recipe = load_recipe([base, above])
    assert [source.name for source in recipe.data.sources] == ["mine"]
    assert len(recipe.data.tasks) == 2
    assert recipe.rl is not None
    assert (recipe.rl.optimizer.lr, recipe.rl.optimizer.beta2) == (1e-4, 0.99)
    assert recipe.rl.loss.clip_eps_high == 2.0


def test_last_of_several_files_wins(base: Path, tmp_path: Path) -> None:
    second = write(tmp_path / "second.toml", "seed = 2\nname = 'second'")
    third = write(tmp_path / "third.toml", "seed = 3")
    recipe = load_recipe([base, second, third])
    assert (recipe.name, recipe.seed) == ("second", 3)


def test_scalar_may_replace_a_table_and_is_then_refused(base: Path, tmp_path: Path) -> None:
    above = write(tmp_path / "above.toml", "rl = 3")
    assert mistakes(base, above) == (
        "rl is 3, but it should be a table; write [rl] and its keys below",
    )


def test_no_file_is_an_error() -> None:
    assert mistakes() == ("no file is given; name at least one",)


def test_all_unreadable_files_are_reported_together(base: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent.toml"
    broken = write(tmp_path / "broken.toml", "seed = 1\nname = tiny\n")
    latin = tmp_path / "latin.toml"
    latin.write_bytes("name = 'café'".encode("latin-1"))
    found = mistakes(base, absent, broken, latin, tmp_path)
    assert found == (
        f"{absent} does not exist; check the path",
        f'{broken}:2 is "name = tiny", which is not TOML: Invalid value; mend it',
        f"{latin} is not UTF-8 (byte 11), but TOML must be; save it as UTF-8",
        f"{tmp_path} cannot be read: Is a directory",
    )


def test_syntax_error_at_the_end_of_a_file_names_its_last_line(tmp_path: Path) -> None:
    (found,) = mistakes(write(tmp_path / "broken.toml", "seed = 1\nname ="))
    assert found.startswith(f'{tmp_path / "broken.toml"}:2 is "name =", which is not TOML')


# Overrides


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=7", "seed", 7),
        (" seed = 7 ", "seed", 7),
        ("pretrain.optimizer.lr=3e-4", "pretrain.optimizer.lr", 3e-4),
        ("model.beta=1", "model.beta", 1.0),
        ("model.tie_embeddings=true", "model.tie_embeddings", True),
        ("name=other", "name", "other"),
        ('name="7"', "name", "7"),
        ("name=2025-06-16", "name", "2025-06-16"),
        ("storage.root=s3://m1/runs", "storage.root", "s3://m1/runs"),
        ("tracking.uri=http://host/?a=b", "tracking.uri", "http://host/?a=b"),
        ("storage.root=a\nseed = 3", "storage.root", "a\nseed = 3"),
        ("register.alias=", "register.alias", ""),
        ("register.alias=best", "register.alias", "best"),
        ("model.layer_pattern=['softmax', 'lightning']", "model.layer_pattern.1", "lightning"),
        ("data.tasks.0.num_rl=3", "data.tasks.0.num_rl", 3),
        ("data.tasks.1.parameters.depth=3", "data.tasks.1.parameters", {"depth": 3}),
        ("data.tasks.0.parameters={ min_terms = 9 }", "data.tasks.0.parameters", {"min_terms": 9}),
        ("data.sources.0={name='b', kind='python_stdlib'}", "data.sources.0.name", "b"),
        ("rl.sampling.top_p=0.5", "rl.sampling.top_p", 0.5),
    ],
)
def test_override_sets_one_value(base: Path, override: str, path: str, value: Any) -> None:
    assert value_at(load_recipe([base], overrides=[override]), path) == value


def test_overrides_apply_in_order_and_leave_neighbours_alone(base: Path) -> None:
    recipe = load_recipe([base], overrides=["rl.group_size=8", "rl.group_size=16"])
    assert recipe.rl is not None
    assert (recipe.rl.group_size, recipe.rl.num_steps) == (16, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "it is not dotted.key=value; write for example rl.group_size=8"),
        ("=3", "it is not dotted.key=value; write for example rl.group_size=8"),
        ("rl..group_size=3", "it is not dotted.key=value; write for example rl.group_size=8"),
        (
            "data.tasks.2.num_rl=3",
            "data.tasks is an array without an entry 2; its indices are 0 to 1",
        ),
        (
            "data.tasks.-1.num_rl=3",
            "data.tasks is an array without an entry -1; its indices are 0 to 1",
        ),
        (
            "data.tasks.sums.num_rl=3",
            "data.tasks is an array without an entry sums; its indices are 0 to 1",
        ),
        ("data.tasks.2={}", "data.tasks is an array without an entry 2; its indices are 0 to 1"),
        ("name.first=3", 'name is "tiny", which has no first; shorten the key'),
        ("rl.num_steps.a.b=3", "rl.num_steps is 2, which has no a; shorten the key"),
    ],
)
def test_override_that_names_no_place_is_refused(base: Path, override: str, message: str) -> None:
    assert mistakes(base, overrides=(override,)) == (f"override {override!r}: {message}",)


def test_override_into_an_empty_array_is_refused(base: Path) -> None:
    found = mistakes(base, overrides=("data.sources=[]", "data.sources.0.name=x"))
    assert found[0].endswith("data.sources is an array without an entry 0; it is empty")


def test_override_of_the_wrong_type_is_refused_like_a_file(base: Path) -> None:
    assert mistakes(base, overrides=("rl.group_size=four",)) == (
        'rl.group_size is "four", but it should be a valid integer, '
        "unable to parse string as an integer; change it",
    )


# Mistakes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.grup_size=2", "unknown key rl.grup_size; did you mean group_size?"),
        ("regster.alias=a", "unknown key regster; did you mean register?"),
        ("register.alais=a", "unknown key register.alais; did you mean alias?"),
        ("register_.alias=a", "unknown key register_; did you mean register?"),
        ("data.tasks.1.num_r=2", "unknown key data.tasks.1.num_r; did you mean num_rl?"),
        ("rl.optimizer.betta1=0.5", "unknown key rl.optimizer.betta1; did you mean beta1?"),
        (
            "storage.zzz=2",
            "unknown key storage.zzz; remove it or use one of root, scratch",
        ),
        (
            "data.sources.0.kind=floder",
            'data.sources.0.kind is "floder", but it should be '
            "'python_stdlib', 'folder', 'jsonl' or 's3'; change it",
        ),
        (
            "data.sources=[]",
            "data.sources is [], but it should have at least 1 item; change it",
        ),
        (
            "data.sources={}",
            "data.sources is {}, but it should be an array; "
            "write [...], or [[data.sources]] for tables",
        ),
        (
            "data.tasks.0.parameters=3",
            "data.tasks.0.parameters is 3, but it should be a table; "
            "write [data.tasks.0.parameters] and its keys below",
        ),
        (
            "pretrain.optimizer={}",
            "pretrain.optimizer.lr is missing, but required; add it (Peak learning rate)",
        ),
        (
            "sft.parallel.data=1",
            "sft.num_steps is missing, but required; add it (Optimizer steps)",
        ),
        (
            "pretrain.optimizer.lr=0",
            "pretrain.optimizer.lr is 0, but it should be greater than 0; change it",
        ),
        (
            "model.beta=inf",
            "model.beta is Infinity, but it should be a finite number; change it",
        ),
        (
            "name=Big Name",
            'name is "Big Name", but it should match pattern '
            "'^[a-z0-9][a-z0-9_-]{0,40}$'; change it",
        ),
        (
            "rl.group_size=1",
            "rl.group_size is 1, but advantages need at least 2 completions per task; raise it",
        ),
        (
            "data.tasks.0.num_rl=0",
            "rl is present, but no entry of data.tasks has num_rl > 0; add tasks for RL",
        ),
    ],
)
def test_mistake_is_described(base: Path, override: str, message: str) -> None:
    assert message in mistakes(base, overrides=(override,))


def test_long_values_are_shortened(base: Path) -> None:
    (found,) = mistakes(base, overrides=(f"seed={'x' * 100}",))
    assert f'seed is "{"x" * 56}..., but' in found


def test_mistakes_in_different_tables_are_reported_together(base: Path, tmp_path: Path) -> None:
    above = write(
        tmp_path / "above.toml",
        "sede = 2\n[model]\nnum_heads = 5\nrotary_dim = 7\n[pretrain]\nglobal_batch_rows = 7\n"
        "[rl]\ngrup_size = 2\nnum_steps = 'two'\n",
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe([base, above], overrides=["nonsense", "register.model_name=3"])
    heads = [" ".join(mistake.split()[:3]) for mistake in caught.value.mistakes]
    assert sorted(heads) == [
        "model.num_heads is 5,",
        "model.rotary_dim is 7,",
        "override 'nonsense': it",
        "pretrain.global_batch_rows is 7,",
        "register.model_name is 3,",
        'rl.num_steps is "two",',
        "unknown key rl.grup_size;",
        "unknown key sede;",
    ]
    lines = str(caught.value).splitlines()
    assert lines[0] == f"8 mistakes in {base}, {above}:"
    assert [line.strip() for line in lines[1:]] == list(caught.value.mistakes)


def test_recipe_error_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(M1Error, match=r"1 mistake in .*absent\.toml:\n"):
        load_recipe([tmp_path / "absent.toml"])


# Resolved recipes and the schema


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipe_resolves_under_its_own_name(path: Path) -> None:
    recipe = load_recipe([path])
    assert recipe.name == path.stem
    assert Recipe.model_validate_json(recipe_json(recipe)) == recipe


def test_published_recipe_has_the_published_size() -> None:
    model = load_recipe([RECIPES / "m1_456b.toml"]).model
    assert model.moe is not None
    assert model.vocab_size is not None
    width, heads = model.hidden_size, model.num_heads * model.head_dim
    expert = 3 * width * model.moe.ffn_hidden_size
    lightning = 5 * width * heads + heads
    softmax = 2 * width * heads + 2 * width * model.num_kv_heads * model.head_dim
    shared = (2 + model.moe.num_experts) * width
    num_softmax = model.layer_kinds.count("softmax")
    attention = num_softmax * softmax + (model.num_layers - num_softmax) * lightning

    def body(num_experts: int) -> int:
        return attention + model.num_layers * (num_experts * expert + shared) + width

    assert num_softmax == 10
    assert body(model.moe.num_experts) + 2 * model.vocab_size * width == pytest.approx(
        456.09e9, abs=0.005e9
    )
    assert body(model.moe.top_k) == pytest.approx(45.94e9, abs=0.05e9)


def test_resolved_json_uses_the_names_in_files(base: Path) -> None:
    resolved = json.loads(recipe_json(load_recipe([base])))
    assert resolved["register"] == {"model_name": "m1", "alias": "champion"}
    assert resolved["rl"]["repetition_stop"] == {"num_tokens": 3000, "probability": 0.99}


def test_committed_json_schema_is_fresh() -> None:
    committed = (RECIPES / "recipe.schema.json").read_text(encoding="utf-8")
    assert committed == json_schema(), (
        "run `m1 recipe schema --write pipelines/recipes/recipe.schema.json`"
    )


def test_json_schema_refuses_unknown_keys_and_documents_every_field() -> None:
    schema = json.loads(json_schema())
    assert "register" in schema["properties"]
    for table in (schema, *schema["$defs"].values()):
        assert table["additionalProperties"] is False
        assert all("description" in field for field in table["properties"].values())


def test_loading_imports_no_torch() -> None:
    code = "import sys, m1.config.loading; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Differences


def diff(old: Path, *overrides: str) -> dict[str, StageChange]:
    changes = explain_diff(load_recipe([old]), load_recipe([old], overrides=overrides))
    return {change.stage: change for change in changes}


def test_equal_recipes_change_no_stage(base: Path) -> None:
    recipe = load_recipe([base])
    assert explain_diff(recipe, recipe) == tuple(
        StageChange(stage, "unchanged") for stage in STAGES if stage not in ("sandbox", "sft")
    )


def test_moving_a_run_changes_no_stage(base: Path) -> None:
    changes = diff(base, "storage.root=s3://m1", "tracking.experiment=other")
    assert {change.status for change in changes.values()} == {"unchanged"}


def test_changed_stage_names_its_fields_and_its_children_name_it(base: Path) -> None:
    changes = diff(base, "rl.group_size=8", "rl.optimizer.lr=2e-4")
    assert changes["rl"] == StageChange(
        "rl",
        "changes",
        fields=(
            FieldChange("rl.group_size", 4, 8),
            FieldChange("rl.optimizer.lr", 1e-4, 2e-4),
        ),
    )
    assert changes["evaluate"] == StageChange("evaluate", "changes", parents=("rl",))
    assert changes["register"] == StageChange("register", "changes", parents=("rl",))
    assert {changes[stage].status for stage in ("data", "pretrain")} == {"unchanged"}


def test_stage_may_change_for_its_fields_and_its_parents(base: Path) -> None:
    pretrain = diff(base, "seed=2")["pretrain"]
    assert pretrain.fields == (FieldChange("seed", 1, 2),)
    assert pretrain.parents == ("data",)


def test_entries_of_arrays_and_tables_are_compared_one_by_one(base: Path) -> None:
    changes = diff(
        base,
        "data.tasks.1.num_rl=9",
        "data.tasks.0.parameters={ min_terms = 2, min_digits = 1 }",
    )
    assert changes["data"].fields == (
        FieldChange("data.tasks.0.parameters.max_terms", 3, ABSENT),
        FieldChange("data.tasks.0.parameters.min_digits", ABSENT, 1),
        FieldChange("data.tasks.1.num_rl", 0, 9),
    )


def test_optional_table_that_appears_is_one_change(base: Path) -> None:
    (change,) = diff(base, "model.layer_pattern=['softmax','softmax']")["pretrain"].fields
    assert change == FieldChange("model.layer_pattern", None, ["softmax", "softmax"])


def test_added_and_removed_stages_change_their_children(base: Path) -> None:
    old = load_recipe([base])
    trained = old.pretrain.model_dump(exclude={"start"})
    new = Recipe.model_validate({**old.model_dump(by_alias=True), "sft": trained, "rl": None})
    changes = {change.stage: change for change in explain_diff(old, new)}
    assert list(changes) == [stage for stage in STAGES if stage != "sandbox"]
    assert changes["sft"] == StageChange("sft", "added")
    assert changes["rl"] == StageChange("rl", "removed")
    assert changes["evaluate"] == StageChange("evaluate", "changes", parents=("sft", "rl"))
