import json
import statistics
import time
from dataclasses import replace
from random import Random

import pytest
from wrong_answers import MAKERS

from m1.data.logic.catalogue import LOGIC_TASKS, logic_task
from m1.data.logic.cells import CellsTask
from m1.rewards.logic import verify
from m1.types import M1Error

DIFFICULTIES = (1, 5, 10)
NAMES = sorted(LOGIC_TASKS)
JUNK = (
    "",
    "   ",
    "I do not know.",
    "42 " * 50,
    "```\n```",
    "\x00\x01",
    "∞",
    "-" * 200,
    "[[[[",
)
MEDIAN_SECONDS = 0.05
"""Processor time: neighbours on the same cores must not fail a test."""


def through_json(task):
    """The task as a worker gets it."""
    return replace(task, metadata=json.loads(json.dumps(task.metadata)))


def audit(name, num_instances, num_mutations):
    """Failures of one task over all difficulties, and median processor seconds to generate."""
    judge, failures, medians = logic_task(name), [], []
    for difficulty in DIFFICULTIES:
        seconds = []
        for seed in range(num_instances):
            started = time.process_time()
            task = judge.generate(seed, difficulty)
            seconds.append(time.process_time() - started)
            failures += faults(through_json(task), Random(seed), num_mutations)
        medians.append(statistics.median(seconds))
    return failures, medians


def faults(task, rng, num_mutations):
    name = task.verifier.partition(":")[2]
    found = []
    if not verify(task, task.reference).accuracy:
        found.append(("own solution rejected", task.task_id))
    for _ in range(num_mutations):
        wrong = MAKERS[name](task, rng)
        if verify(task, wrong).accuracy:
            found.append(("wrong answer accepted", task.task_id, wrong))
    for text in (*JUNK, task.prompt, task.prompt + "\n" + task.prompt):
        if verify(task, text).accuracy:
            found.append(("junk accepted", task.task_id, text[:40]))
    for other in alternatives(task):
        if not verify(task, other).accuracy:
            found.append(("other solution rejected", task.task_id, other))
    return found


def alternatives(task):
    """Other valid answers, where the kind of task has some."""
    name = task.verifier.partition(":")[2]
    judge = logic_task(name)
    found = [f"<think>hm</think><answer>{task.reference}</answer>", f"```\n{task.reference}\n```"]
    if isinstance(judge, CellsTask) and task.difficulty <= 5:
        found += judge.other_solutions(task.metadata, 3)
    if name in ("game_of_24", "mathador"):
        found += [f"({task.reference})", f"{task.reference} = {task.metadata['target']}"]
    if name == "jugs":
        found.append("fill A\nempty A\n" + task.reference)
    if name == "tower_of_hanoi":
        first = task.reference.split()[0]
        found.append(f"{first} {first[::-1]} {task.reference}")
    return found


def test_there_are_at_least_41_tasks_each_with_wrong_answers():
    assert len(NAMES) >= 41
    assert sorted(MAKERS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_solutions_are_accepted_and_wrong_answers_rejected(name):
    failures, _ = audit(name, num_instances=4, num_mutations=10)
    assert not failures


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_give_equal_tasks_and_different_seeds_different_ones(name):
    judge = logic_task(name)
    assert judge.generate(3, 4) == judge.generate(3, 4)
    assert len({judge.generate(seed, 4).prompt for seed in range(8)}) > 4


@pytest.mark.parametrize("name", NAMES)
def test_the_cost_of_solving_grows_with_difficulty(name):
    judge = logic_task(name)

    def cost(difficulty):
        tasks = [judge.generate(seed, difficulty) for seed in range(9)]
        return statistics.median(judge.cost(task.metadata) for task in tasks)

    assert cost(1) < cost(8)


def test_a_second_solution_of_a_sudoku_is_accepted():
    judge = logic_task("sudoku")
    for seed in range(20):
        task = judge.generate(seed, 2)
        others = [s for s in judge.other_solutions(task.metadata, 3) if s != task.reference]
        for other in others:
            rows = [line.split() for line in other.splitlines()]
            assert all(len(set(line)) == 4 for line in (*rows, *zip(*rows, strict=True)))
            assert verify(task, other).accuracy
        if others:
            return
    pytest.fail("no instance with two solutions was drawn")


def test_a_difficulty_outside_the_range_is_refused():
    with pytest.raises(M1Error, match="must lie in 1 to 10"):
        logic_task("sudoku").generate(0, 11)


def test_an_unknown_task_is_named():
    with pytest.raises(M1Error, match="'sudoko' is not known"):
        logic_task("sudoko")


def test_expressions_are_parsed_and_never_executed(tmp_path):
    task = logic_task("game_of_24").generate(0, 1)
    marker = tmp_path / "executed"
    for answer in (
        f"open({str(marker)!r},'w')",
        "__import__('os')",
        "9**9**9",
        "1/0",
        "((((" * 500,
    ):
        assert verify(task, answer).accuracy == 0
    assert not marker.exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_200_instances_at_three_difficulties_with_50_wrong_answers_each(name):
    failures, medians = audit(name, num_instances=200, num_mutations=50)
    assert not failures
    assert max(medians) < MEDIAN_SECONDS, medians
