"""Tasks of a set, as `m1 curate` writes them, trained on with verdicts of the reward service."""

import psutil
import pytest

from m1.config.loading import load_recipe
from m1.data.tasks import read_tasks, write_tasks
from m1.launch import run_stage
from m1.stage import METRICS, read_metrics, stage_folder
from m1.types import Task

OVERLAY = """
[[data.tasks]]
name = "sums"
dataset = "chain_sum"
parameters = {{ min_terms = 2, max_terms = 2, min_digits = 1, max_digits = 1 }}
num_sft = 60
num_heldout = 5

[[data.tasks]]
name = "fractions"
uri = "{uri}"
num_rl = 20
num_heldout = 5
"""


@pytest.mark.exhaustive  # four stages
def test_rl_trains_on_curated_tasks_judged_by_the_service(tmp_path, pytestconfig):
    tasks = [
        Task(f"f-{n}", "sheet", f"Write 1 / {n} as a fraction.", f"\\frac{{1}}{{{n}}}", "maths")
        for n in range(1, 41)
    ]
    write_tasks(tmp_path / "tasks.jsonl", tasks)
    overlay = tmp_path / "overlay.toml"
    overlay.write_text(OVERLAY.format(uri=tmp_path / "tasks.jsonl"))
    mini = pytestconfig.rootpath / "tests/recipes/mini.toml"
    recipe = load_recipe([mini, overlay], overrides=[f"storage.root={tmp_path / 'runs'}"])
    for stage in ("data", "pretrain", "sft", "rl"):
        pointer = run_stage(stage, recipe)
    assert pointer.step == 3 * 2
    kept = read_tasks(stage_folder("data", recipe) / "output/tasks/rl.jsonl")
    assert {task.verifier for task in kept} == {"maths"}
    assert {task.source for task in kept} == {"fractions"} and len(kept) == 20
    metrics = [line["metrics"] for line in read_metrics(stage_folder("rl", recipe) / METRICS)]
    assert len(metrics) == 3
    assert all(m["rl/failed_rollouts"] == 0 for m in metrics)  # every one has a verdict
    children = psutil.Process().children(recursive=True)
    assert not [p for p in children if "service" in " ".join(p.cmdline())]
