"""RL in two lengths: a chain of stages, each with its checkpoint, pass rates and gate."""

import json
from pathlib import Path

from m1.config.loading import load_recipe
from m1.rollout.traces import read_step, steps_in, tally_accuracy
from m1.stage import finished, stage_folder
from m1.train.task_filter import read_tallies

MINI = Path(__file__).parents[1] / "recipes/mini.toml"
# The gate opens as soon as it may: any perplexity has converged, any length is near the limit.
LENGTHS = [
    "rl.lengths=[{max_new_tokens=12, min_steps=7, max_steps=9}, "
    "{max_new_tokens=24, min_steps=1, max_steps=2, keep_fraction={sums=0.5}}]",
    "rl.gate={window_steps=3, perplexity_tolerance=9.0, perplexity_release=9.0, "
    "length_fraction=0.0, length_release=0.0, hold_steps=1}",
    "rl.checkpoint_every_steps=4",
]


def test_the_gate_ends_a_length_and_the_next_starts_from_it(first_run, m1):
    overrides = [f"storage.root={first_run[0]}", *LENGTHS]
    sets = [f"--set={o}" for o in overrides]
    recipe = load_recipe([MINI], overrides=overrides)
    for stage in ("rl_12", "rl_24"):
        done = m1("stage", stage, "tests/recipes/mini.toml", *sets)
        assert done.returncode == 0, done.stdout + done.stderr
    short, long = (finished(stage, recipe) for stage in ("rl_12", "rl_24"))
    assert short is not None
    assert long is not None
    decision = short.metadata["gate"]
    assert (decision["verdict"], decision["step"]) == ("open", 7)
    assert (long.metadata["gate"]["verdict"], long.metadata["gate"]["step"]) == ("out_of_steps", 2)
    rollouts = {s: stage_folder(s, recipe) / "rollouts" for s in ("rl_12", "rl_24")}
    assert steps_in(rollouts["rl_12"]) == list(range(1, 8))
    lengths = {s: {len(r.tokens) for r in read_step(f, 1)} for s, f in rollouts.items()}
    assert max(lengths["rl_12"]) <= 12 < max(lengths["rl_24"])
    # The second length has half the tasks, and starts at the weights that the first one made.
    seen = {s: tally_accuracy(folder) for s, folder in rollouts.items()}
    assert 0 < len(seen["rl_24"]) < len(seen["rl_12"])
    assert read_tallies(Path(short.uri)) == seen["rl_12"]
    assert read_tallies(Path(long.uri)) == {**seen["rl_12"], **seen["rl_24"]}
    log = [json.loads(line) for line in metrics_of("rl_24", recipe)]
    assert "rl/gate_held_steps" in log[-1]["metrics"]
    assert short.digest != long.digest


def metrics_of(stage, recipe):
    return (stage_folder(stage, recipe) / "metrics.jsonl").read_text().splitlines()
