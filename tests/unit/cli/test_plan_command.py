import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from m1.cli import app
from m1.config.loading import RecipeError
from m1.types import M1Error

RECIPES = Path(__file__).parents[3] / "pipelines/recipes"
LAPTOP, M1_456B = RECIPES / "laptop.toml", RECIPES / "m1_456b.toml"


def output(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_parses_and_holds_the_published_size() -> None:
    plan = json.loads(output(M1_456B, "--json"))
    assert plan["parameters"]["total"] == 456_089_655_296
    assert plan["parameters"]["active"] == 45_944_920_064


def test_the_page_names_size_memory_cost_and_comparison() -> None:
    page = output(M1_456B, "--gpu", "h200")
    for words in ("456.09 B total, 45.94 B active", "512 h200", "GPU hours", "26.4%", "33.5%"):
        assert words in page


@pytest.mark.parametrize("stage", ["pretrain", "sft", "rl"])
def test_every_training_stage_of_the_laptop_recipe_has_a_plan(stage: str) -> None:
    assert json.loads(output(LAPTOP, "--json", "--stage", stage))["stage"] == stage
    assert f"laptop, {stage} on" in output(LAPTOP, "--stage", stage)


def test_overrides_and_options_reach_the_plan() -> None:
    plan = json.loads(
        output(
            *(LAPTOP, "--set", "model.num_layers=4", "--mfu", "0.5", "--json"),
            *("--price-per-gpu-hour", "3", "--sequences", "7", "--length", "99"),
        )
    )
    assert plan["memory"]["worst"]["layers"] == 4
    assert (plan["cost"]["mfu"], plan["cost"]["price_per_gpu_hour"]) == (0.5, 3.0)
    decoding = plan["memory"]["decoding"]
    assert (decoding["num_sequences"], decoding["length"]) == (7, 99)


def test_plot_writes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "flops.svg"
    output(M1_456B, "--plot", path)
    assert "<svg" in path.read_text()


def test_a_bad_gpu_ends_with_a_message_and_status_1(m1) -> None:
    result = m1("plan", str(LAPTOP), "--gpu", "tpu")
    assert result.returncode == 1
    assert "gpu is 'tpu', but figures are known of h800, h100, h200" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_layout_that_does_not_divide_the_model_is_refused_by_the_recipe() -> None:
    with pytest.raises(RecipeError, match="tensor is 3"):
        output(LAPTOP, "--set", "pretrain.parallel.tensor=3")


def test_an_absent_stage_is_refused() -> None:
    with pytest.raises(M1Error, match="stage is 'data'"):
        output(LAPTOP, "--stage", "data")


def test_planning_imports_neither_torch_nor_megatron() -> None:
    program = (
        "import sys; from m1.cli import app;"
        "from m1.plan import display, figure, report;"
        f"app(['plan', {str(LAPTOP)!r}], standalone_mode=False);"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
