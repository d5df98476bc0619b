import json

from typer.testing import CliRunner

from m1.cli import app
from m1.rollout.traces import write_step
from m1.types import Completion, Reward, Rollout, RolloutGroup, Task


def stage_with_rollouts(folder):
    task = Task("sum-1", "sums", "What is [2] + 2?", "4", "v")
    rollouts = tuple(
        Rollout(
            task,
            Completion((1, 2), (5,) * 3, (-1.0,) * 3, (0.0,) * 3, "length", (7, 7, 8)),
            Reward(total, accuracy, {"correctness": accuracy, "format": 0.1}),
        )
        for total, accuracy in ((1.1, 1.0), (0.1, 0.0))
    )
    for step in (1, 2):
        write_step(
            folder / "rollouts", step, [RolloutGroup(task, rollouts)], decode=lambda _: "[four]"
        )
    return folder


def test_show_prints_text_rewards_and_versions_as_they_are(tmp_path):
    folder = stage_with_rollouts(tmp_path / "rl-abc")
    result = CliRunner().invoke(app, ["rollouts", "show", str(folder), "--step=1", "--index=1"])
    assert result.exit_code == 0, result.output
    for expected in (
        "What is [2] + 2?",
        "[four]",
        "0.1 (correctness 0, format 0.1)",
        "length",
        "7 to 8",
        "1 of 2 kept",
    ):
        assert expected in result.output


def test_show_gives_the_last_step_and_every_column_as_json(tmp_path):
    folder = stage_with_rollouts(tmp_path / "rl-abc")
    result = CliRunner().invoke(app, ["rollouts", "show", str(folder), "--json"])
    row = json.loads(result.output)
    assert (row["step"], row["index"], row["tokens"]) == (2, 0, [5, 5, 5])


def test_show_refuses_a_stage_that_kept_nothing(tmp_path):
    folder = stage_with_rollouts(tmp_path / "rl-abc")
    result = CliRunner().invoke(app, ["rollouts", "show", str(folder), "--stage=rl_9"])
    assert "stage 'rl_9' kept no rollouts" in str(result.exception)
