"""What KFP's UI shows of a stage."""

import json
from pathlib import Path

from m1.config.loading import load_recipe
from m1.evaluate.stage_page import show_stage
from m1.types import Pointer

RECIPE = Path("tests/recipes/mini.toml")


def pointer(stage, **metadata):
    return Pointer(stage, "ab" * 32, "s3://m1/x", "cd" * 32, 3, {"seconds": 61.0, **metadata})


def test_numbers_curves_and_facts_of_a_stage_that_trained(tmp_path):
    recipe = load_recipe([RECIPE], overrides=[f"storage.root={tmp_path}"])
    folder = tmp_path / "stages" / "pretrain-abababababab"
    folder.mkdir(parents=True)
    rows = [
        {"step": step, "total": 3, "metrics": {"pretrain/loss": 5.0 - step}} for step in (1, 2, 3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = show_stage(recipe, pointer("pretrain", model_id="m-1"))
    assert page.metrics == {"pretrain/loss": 2.0}
    assert (
        "<svg" in page.html
        and "s3://m1/x" in page.html
        and "http" not in page.html.split("<svg")[0]
    )
    assert "| pretrain/loss | 2 |" in page.markdown and "| model id | `m-1` |" in page.markdown
    assert "| took | `1m01s` |" in page.markdown


def test_scores_are_metrics_by_benchmark_and_model(tmp_path):
    recipe = load_recipe([RECIPE], overrides=[f"storage.root={tmp_path}"])
    score = {"mean": 0.5, "low": 0.4, "high": 0.6}
    page = show_stage(recipe, pointer("evaluate", scores={"sums": {"rl": score}}))
    assert page.metrics == {"evaluate/sums/rl": 0.5}
    assert "<svg" in page.html


def test_text_of_data_cannot_become_markup(tmp_path):
    recipe = load_recipe([RECIPE], overrides=[f"storage.root={tmp_path}"])
    page = show_stage(recipe, pointer("data", card={"source": "<script>alert(1)</script>"}))
    assert "<script>" not in page.html and "&lt;script&gt;" in page.html
    assert page.metrics == {}
