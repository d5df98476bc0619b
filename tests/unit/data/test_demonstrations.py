import re

import pytest

from m1.config.schema import TaskSourceConfig
from m1.data.demonstrations import write_solution
from m1.data.tasks import make_tasks
from m1.types import M1Error, Task

CHAIN = {"min_terms": 1, "max_terms": 5, "max_digits": 3, "allow_negation": True}
MIXED = {"max_terms": 5, "max_digits": 2, "operators": ["+", "-", "*"]}


def task(expression, reference, dataset="basic_arithmetic"):
    metadata = {"expression": expression}
    return Task("t", "s", "p", reference, f"reasoning_gym:{dataset}", metadata)


@pytest.mark.parametrize(
    ("expression", "reference", "think"),
    [
        ("4 - 1 - 7", "-4", "4-1=3 3-7=-4"),
        ("2 + 3 * 4", "14", "3*4=12 2+12=14"),
        ("2 * 3 * 4 - 1", "23", "2*3=6 6*4=24 24-1=23"),
        ("2 - -1", "3", "2--1=3"),
        ("-5 * 2", "-10", "-5*2=-10"),
        ("( 2 + 3 ) * 4", "20", "2+3=5 5*4=20"),
        ("-( 2 + 3 ) - 1", "-6", "2+3=5 -(5)=-5 -5-1=-6"),
        ("12 / 4 + 1", "4", "12/4=3 3+1=4"),
        ("7", "7", "7"),
    ],
)
def test_steps_follow_precedence(expression, reference, think):
    assert write_solution(task(expression, reference)) == think


@pytest.mark.parametrize(
    ("dataset", "parameters"),
    [
        ("chain_sum", CHAIN),
        ("basic_arithmetic", MIXED),
        ("basic_arithmetic", {**MIXED, "operators": ["+", "-", "*", "/"]}),
        ("basic_arithmetic", {**MIXED, "allow_parentheses": False}),
    ],
)
def test_500_random_demonstrations_are_true_and_end_in_the_answer(dataset, parameters):
    config = TaskSourceConfig(name="s", dataset=dataset, parameters=parameters, num_sft=500)
    for item in make_tasks([config], 3).sft:
        think = write_solution(item)
        steps = think.split(" ")
        for step in steps if "=" in think else []:
            left, right = step.split("=")
            assert eval(left) == int(right)
        assert steps[-1].split("=")[-1] == item.reference
        # Python's own arithmetic on the question, independent of the solver.
        expression = re.sub(r"(?<=[\d)(+*/-]) +(?=\d)", "", item.metadata["expression"])
        assert eval(expression) == int(item.reference)


@pytest.mark.parametrize(("expression", "reference"), [("1 + 2 * 3", "9"), ("7 / 2", "3")])
def test_a_reference_that_the_steps_do_not_reach_is_refused(expression, reference):
    with pytest.raises(ValueError, match="worked answer"):
        write_solution(task(expression, reference))


def test_a_dataset_without_writer_names_those_that_have_one():
    with pytest.raises(M1Error, match="basic_arithmetic, chain_sum"):
        write_solution(task("1", "1", dataset="zebra_puzzles"))
