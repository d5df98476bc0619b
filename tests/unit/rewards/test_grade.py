import json

import pytest
from typer.testing import CliRunner

from m1.cli import app
from m1.data.logic.catalogue import logic_task
from m1.rewards.grade import grade, grade_file
from m1.rewards.service.pool import RewardService, ServiceConfig
from m1.types import M1Error

MATHS = {"verifier": "maths", "reference": "1/2"}
SUDOKU = logic_task("sudoku").generate(1, 1)
ROWS = [
    {**MATHS, "completion": r"\boxed{0.5}", "id": 1},
    {**MATHS, "completion": "<think>half</think><answer>1/2</answer>", "id": 2},
    {**MATHS, "completion": "1/3", "id": 3},
    {"task": SUDOKU.__dict__, "completion": SUDOKU.reference, "id": 4},
    {"verifier": "instructions:ifeval", "reference": "no suite", "completion": "a", "id": 5},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grade")
    source = write(folder / "in.jsonl", ROWS)
    summary = grade_file(
        source, folder / "out.jsonl", config=ServiceConfig(num_workers=1), format_weight=0.25
    )
    return summary, [json.loads(line) for line in (folder / "out.jsonl").open()]


def test_lines_keep_their_order_and_fields_and_gain_a_reward(graded):
    _, lines = graded
    assert [{k: line[k] for k in row} for line, row in zip(lines, ROWS, strict=True)] == ROWS
    assert [line["reward"] for line in lines] == [1.0, 1.25, 0.0, 1.0, None]
    assert [line["parts"].get("format") for line in lines] == [0, 1, 0, 0, None]
    assert lines[2]["reason"] == "different: number"
    assert all(line["seconds"] >= 0 for line in lines)


def test_an_infrastructure_error_is_named_and_no_reward(graded):
    summary, lines = graded
    assert lines[4]["infra_error"].startswith("verifier_error: M1Error: the reference of an instr")
    assert [line["infra_error"] for line in lines[:4]] == [None] * 4
    assert (summary.num_lines, summary.num_infra_errors) == (5, 1)
    assert summary.mean_reward == pytest.approx(3.25 / 4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Expecting"),
        ("[]", "line 2: the line is list"),
        ('{"verifier": "maths", "reference": "1"}', "line 2: completion is absent"),
        ('{"completion": "1"}', "line 2: verifier and reference absent"),
        ('{"completion": "1", "task": 3}', "line 2: task is int"),
        ('{"completion": "1", "verifier": "nobody", "reference": ""}', "'nobody' is not known"),
    ],
)
def test_a_line_that_cannot_be_graded_is_named_and_nothing_written(tmp_path, line, message):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    with pytest.raises(M1Error, match=message):
        grade_file(source, tmp_path / "out.jsonl", config=ServiceConfig(num_workers=1))
    assert not (tmp_path / "out.jsonl").exists()


def test_rows_are_graded_in_python_too():
    with RewardService(ServiceConfig(num_workers=1)) as service:
        (row,) = grade([ROWS[3]], service)
    assert row["reward"] == 1


def test_the_command_writes_the_file_and_says_what_happened(tmp_path):
    source = write(tmp_path / "in.jsonl", ROWS[:3])
    arguments = ["grade", str(source), str(tmp_path / "out.jsonl"), "--workers", "1"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "3 lines, mean reward 0.6667, 0 infrastructure errors" in " ".join(result.stdout.split())
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3
