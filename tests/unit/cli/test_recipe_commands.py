import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from m1.cli_recipe import app
from m1.config.loading import RecipeError, json_schema

LAPTOP = Path(__file__).parents[3] / "pipelines/recipes/laptop.toml"


def output(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def rows(text: str) -> list[list[str]]:
    """Words of each line, without the head."""
    return [line.split() for line in text.splitlines()[1:]]


def test_show_prints_the_resolved_recipe_as_json() -> None:
    resolved = json.loads(output("show", LAPTOP))
    assert resolved["name"] == "laptop"
    assert resolved["model"]["beta"] == 1.0


def test_show_merges_files_and_then_applies_overrides(tmp_path: Path) -> None:
    above = tmp_path / "above.toml"
    above.write_text("seed = 5\n[storage]\nroot = 's3://m1'\n")
    text = output("show", LAPTOP, above, "--set", "seed=6", "--set", "tracking.experiment=x")
    resolved = json.loads(text)
    assert resolved["seed"] == 6
    assert resolved["storage"]["root"] == "s3://m1"
    assert resolved["tracking"]["experiment"] == "x"


def test_diff_of_equal_recipes_has_no_reasons() -> None:
    stages = ("data", "sandbox", "pretrain", "sft", "rl", "evaluate", "register")
    assert rows(output("diff", LAPTOP, LAPTOP)) == [[stage, "unchanged"] for stage in stages]


def test_diff_says_what_changes_and_why() -> None:
    before = json.loads(output("show", LAPTOP))
    beta, group_size = str(before["model"]["beta"]), str(before["rl"]["group_size"])
    text = output("diff", LAPTOP, LAPTOP, "--set", "model.beta=0.53", "--set", "rl.group_size=37")
    beta_row = ["model.beta:", beta, "->", "0.53"]
    assert [line.split() for line in text.splitlines()] == [
        ["stage", "status", "why"],
        ["data", "unchanged"],
        ["sandbox", "unchanged"],
        ["pretrain", "changes", *beta_row],
        ["sft", "changes", *beta_row],
        ["because", "pretrain", "changes"],
        ["rl", "changes", *beta_row],
        ["rl.group_size:", group_size, "->", "37"],
        ["because", "pretrain,", "sft", "change"],
        ["evaluate", "changes", *beta_row],
        ["because", "pretrain,", "sft,", "rl", "change"],
        ["register", "changes", *beta_row],
        ["because", "pretrain,", "sft,", "rl", "change"],
    ]


def test_diff_names_added_stages(tmp_path: Path) -> None:
    pretrained = tmp_path / "pretrained.toml"
    text = LAPTOP.read_text()
    pretrained.write_text(text[: text.index("[register]")])
    assert rows(output("diff", pretrained, LAPTOP))[-1] == ["register", "added"]
    assert rows(output("diff", LAPTOP, pretrained))[-1] == ["register", "removed"]


def test_schema_is_printed_exactly() -> None:
    assert output("schema") == json_schema()


def test_schema_is_written_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.schema.json"
    assert output("schema", "--write", path) == ""
    assert path.read_text(encoding="utf-8") == json_schema()


def test_mistakes_are_left_to_the_main_command() -> None:
    with pytest.raises(RecipeError, match="did you mean group_size"):
        output("show", LAPTOP, "--set", "rl.grup_size=3")


def test_show_needs_a_recipe() -> None:
    result = CliRunner().invoke(app, ["show"])
    assert result.exit_code == 2
