"""Difficulty calibration against solvers whose strength is known."""

import json
import tomllib
from hashlib import sha256

import pytest

from m1.config.data_tables import TaskSourceConfig
from m1.curate.calibration import CalibrateConfig, Subject, calibrate, draw_puzzles, useful
from m1.curate.calibration_files import calibrate_files
from m1.curate.settings import read_settings
from m1.data.logic.catalogue import logic_task
from m1.rewards.service.pool import Judgement
from m1.types import M1Error


class Scripted:
    """Gives the stored solution in a share of its answers that depends on the difficulty."""

    def __init__(self, shares):
        self.shares, self.num_sampled = shares, 0

    def sample(self, tasks, num_samples):
        self.num_sampled += len(tasks) * num_samples
        return [
            [task.reference if self._solves(task, n) else "no idea" for n in range(num_samples)]
            for task in tasks
        ]

    def _solves(self, task, number):
        digest = sha256(f"{task.prompt}/{number}".encode()).digest()
        return int.from_bytes(digest[:4], "big") / 2**32 < self.shares[int(task.difficulty)]


class InProcess:
    """The verifiers without worker processes."""

    def judge_all(self, jobs):
        for task, text in jobs:
            verdict = logic_task(task.verifier.partition(":")[2]).verify(task, text)
            yield Judgement(verdict, None, 0.0)


BASE = Scripted({1: 1.0, 2: 0.75, 3: 0.25, 4: 0.1, 5: 0.0})
STRONG = Scripted({1: 1.0, 2: 1.0, 3: 1.0, 4: 0.0, 5: 0.3})
NAMES = ("sudoku", "operation", "word_sorting")


def settings(**changes):
    given = {"tasks": NAMES, "difficulties": range(1, 6), "num_instances": 40, "num_samples": 10}
    return CalibrateConfig.model_validate({**given, **changes})


def reasons(cells, name):
    return {cell.difficulty: cell.reason for cell in cells if cell.task == name}


@pytest.fixture(scope="module")
def cells():
    return calibrate(settings(), Subject(BASE), Subject(STRONG), InProcess())


@pytest.mark.parametrize("name", NAMES)
def test_useful_difficulties_are_hard_for_the_base_and_possible_for_the_strong_model(cells, name):
    assert reasons(cells, name) == {
        1: "too_easy_for_base",
        2: "too_easy_for_base",
        3: None,
        4: "too_hard_for_strong",
        5: "too_hard_for_base",
    }
    assert useful(cells)[name] == [3]


def test_rates_are_those_of_the_solver(cells):
    for cell in cells:
        share = BASE.shares[cell.difficulty]
        assert cell.base.passes.num_judged == 400
        assert cell.base.passes.share == pytest.approx(
            share, abs=4 * (share * (1 - share) / 400) ** 0.5
        )
        expected = 1 - (1 - share) ** 10
        assert cell.base.pass_at_k == pytest.approx(expected, abs=0.2)


def test_without_a_strong_model_only_the_base_decides():
    found = calibrate(settings(tasks=["operation"]), Subject(BASE), None, InProcess())
    assert useful(found) == {"operation": [3, 4]}


def test_with_a_confidence_too_little_evidence_leaves_a_difficulty_out():
    few = {"tasks": ["operation"], "difficulties": [3], "num_instances": 4, "num_samples": 1}
    base = Subject(Scripted({3: 0.45}))
    assert calibrate(settings(**few), base, None, InProcess())[0].reason in (
        None, "too_easy_for_base", "too_hard_for_base",
    )  # fmt: skip
    (sure,) = calibrate(settings(**few, confidence=0.95), base, None, InProcess())
    assert sure.reason is not None
    many = {**few, "num_instances": 100, "num_samples": 10}
    base = Subject(Scripted({3: 0.4}))
    (found,) = calibrate(settings(**many, confidence=0.95), base, None, InProcess())
    assert found.reason is None


def test_puzzles_differ_and_are_a_function_of_the_seed():
    first = draw_puzzles("sudoku", 2, 30, seed=1)
    assert len({task.prompt for task in first}) == 30
    assert first == draw_puzzles("sudoku", 2, 30, seed=1)
    assert not {t.prompt for t in first} & {t.prompt for t in draw_puzzles("sudoku", 2, 30, seed=2)}


def test_the_table_is_written_as_tasks_of_a_recipe(tmp_path):
    config = settings(num_rl=7, num_instances=5, tasks=["operation", "sudoku"])
    table = calibrate_files(config, tmp_path, base=BASE, strong=STRONG)
    assert table == {"operation": [3], "sudoku": [3]}
    fragment = tomllib.loads((tmp_path / "tasks.toml").read_text())
    entries = [TaskSourceConfig.model_validate(entry) for entry in fragment["data"]["tasks"]]
    assert [(e.dataset, e.parameters, e.num_rl) for e in entries] == [
        ("logic:operation", {"difficulty": 3}, 7),
        ("logic:sudoku", {"difficulty": 3}, 7),
    ]
    written = json.loads((tmp_path / "difficulties.json").read_text())
    assert written["useful"] == table
    for cell in written["cells"]:
        low, high = cell["base"]["interval_95"]
        assert low <= cell["base"]["pass_rate"] <= high
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_settings_are_named(tmp_path):
    path = tmp_path / "c.toml"
    with pytest.raises(M1Error, match="is not a file"):
        read_settings(path, CalibrateConfig, holds="a [base] model")
    for text, message in [
        ('tasks = ["chess"]', "no logic tasks"),
        ("base_low = 0.5", "below base_high"),
        ("difficulties = [11]", "difficulties"),
        ('[base]\nuri = "http://host/v1"', "name is empty"),
    ]:
        path.write_text(text)
        with pytest.raises(M1Error, match=message):
            read_settings(path, CalibrateConfig, holds="a [base] model")
    path.write_text('tasks = ["sudoku"]')
    with pytest.raises(M1Error, match="needs a model"):
        calibrate_files(read_settings(path, CalibrateConfig, holds="a [base] model"), tmp_path)
