import json

import pytest
import reasoning_gym
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from m1.config.schema import TaskSourceConfig
from m1.data.tasks import TaskSplits, make_tasks, num_shared_prompts, read_tasks, write_tasks
from m1.types import M1Error, Task


def source(name="sums", dataset="chain_sum", **fields):
    fields.setdefault("parameters", {"max_terms": 3, "max_digits": 2})
    return TaskSourceConfig(name=name, dataset=dataset, **fields)


def prompts(tasks):
    return [task.prompt for task in tasks]


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_splits_have_the_asked_sizes_and_share_no_prompt(seed, num_sft, num_rl, num_heldout):
    counts = {"num_sft": num_sft, "num_rl": num_rl, "num_heldout": num_heldout}
    splits = make_tasks([source("a", **counts), source("b", **counts)], seed)
    assert len(splits.sft) == 2 * num_sft
    assert len(splits.rl) == 2 * num_rl
    assert len(splits.heldout) == 2 * num_heldout
    everything = prompts((*splits.sft, *splits.rl, *splits.heldout))
    assert len(set(everything)) == len(everything)
    assert num_shared_prompts(splits) == 0


def test_tasks_depend_on_the_seed_alone():
    config = source(num_sft=20, num_rl=20, num_heldout=20)
    assert make_tasks([config], 1) == make_tasks([config], 1)
    # Neighbouring seeds of reasoning-gym itself would share all tasks but one.
    first, second = (set(prompts(make_tasks([config], seed).sft)) for seed in (1, 2))
    assert len(first & second) < 5


def test_a_task_carries_its_source_verifier_reference_and_json_metadata():
    (task,) = make_tasks([source(num_rl=1)], 1).rl
    assert task.source == "sums"
    assert task.verifier == "reasoning_gym:chain_sum"
    assert task.task_id.startswith("sums-")
    assert json.loads(json.dumps(task.metadata)) == task.metadata
    entry = {"answer": task.reference, "metadata": task.metadata}
    assert reasoning_gym.get_score_answer_fn("chain_sum")(task.reference, entry) == 1.0


def test_splits_have_the_same_mixture_although_small_tasks_run_out():
    config = source(parameters={"max_terms": 2, "max_digits": 2}, num_rl=300, num_heldout=300)
    splits = make_tasks([config], 1)
    shares = [
        sum(task.metadata["num_digits"] == 1 for task in tasks) / 300
        for tasks in (splits.rl, splits.heldout)
    ]
    assert abs(shares[0] - shares[1]) < 0.12


def test_wrong_references_are_left_out():
    # reasoning-gym 0.1.25 answers "1 + 2 * 3" with 9 in this setting.
    parameters = {"operators": ["+", "*"], "max_digits": 1, "allow_parentheses": False}
    splits = make_tasks([source("m", "basic_arithmetic", parameters=parameters, num_rl=100)], 1)
    assert splits.draws["m"]["wrong_reference"] > 10
    assert splits.draws["m"]["kept"] == 100
    assert all(eval(task.metadata["expression"]) == int(task.reference) for task in splits.rl)


def test_too_few_unique_tasks_say_how_many_there_are():
    # One term of one digit: ten prompts.
    parameters = {"min_terms": 1, "max_terms": 1, "max_digits": 1}
    with pytest.raises(M1Error, match=r"needs 11 unique .*gave 10 .*lower those counts or widen"):
        make_tasks([source(parameters=parameters, num_rl=11)], 1)
    assert len(make_tasks([source(parameters=parameters, num_rl=10)], 1).rl) == 10


def test_sources_with_equal_prompts_compete_for_them():
    parameters = {"min_terms": 1, "max_terms": 1, "max_digits": 1}
    first = source("a", parameters=parameters, num_rl=6)
    with pytest.raises(M1Error, match=r"'b' needs 6 .*gave 4"):
        make_tasks([first, source("b", parameters=parameters, num_heldout=6)], 1)


@pytest.mark.parametrize(
    ("configs", "words"),
    [
        ([source(dataset="chain_summ", num_rl=1)], "close names: chain_sum"),
        ([source(parameters={"max_term": 2}, num_rl=1)], "correct data.tasks.parameters"),
        ([source(parameters={"min_terms": 0}, num_rl=1)], "min_terms must be positive"),
        ([source(dataset="letter_counting", num_sft=1)], "no solution writer"),
    ],
)
def test_mistakes_in_the_recipe_are_explained(configs, words):
    with pytest.raises(M1Error, match=words):
        make_tasks(configs, 1)


def test_any_dataset_can_feed_rl():
    config = source("letters", "letter_counting", parameters={}, num_rl=5, num_heldout=5)
    assert len(make_tasks([config], 1).rl) == 5


def test_tasks_survive_jsonl(tmp_path):
    tasks = [Task("1", "s", "p\n\u2028é", "r", "v:x", {"a": [1, None, {"b": 0.5}]})]
    write_tasks(tmp_path / "tasks.jsonl", tasks)
    assert read_tasks(tmp_path / "tasks.jsonl") == tasks
    write_tasks(tmp_path / "tasks.jsonl", [])
    assert read_tasks(tmp_path / "tasks.jsonl") == []


def test_shared_prompts_are_counted_up_to_white_space():
    one, two = Task("1", "a", "x  y", "", ""), Task("2", "b", "x y", "", "")
    assert num_shared_prompts(TaskSplits(sft=(one,), heldout=(two,))) == 1


def test_our_own_logic_tasks_are_drawn_by_name_and_difficulty():
    config = source(
        dataset="logic:sudoku", parameters={"difficulty": 2}, num_sft=0, num_rl=5, num_heldout=3
    )
    splits = make_tasks([config], seed=1)
    assert (len(splits.rl), len(splits.heldout)) == (5, 3)
    assert {task.verifier for task in splits.rl} == {"logic:sudoku"}
    assert {task.difficulty for task in splits.rl} == {2.0}
    assert make_tasks([config], seed=1) == splits
    assert make_tasks([config], seed=2).rl != splits.rl


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "logic:sudoko"}, "'sudoko' is not known"),
        ({"dataset": "logic:sudoku", "parameters": {"size": 4}}, "takes one parameter"),
        ({"dataset": "logic:sudoku", "parameters": {"difficulty": 11}}, "must lie in 1 to 10"),
    ],
)
def test_a_wrong_logic_entry_is_refused(changes, message):
    with pytest.raises(M1Error, match=message):
        make_tasks([source(num_sft=0, num_rl=1, **changes)], seed=1)


def a_set(tmp_path, count):
    path = tmp_path / "tasks.jsonl"
    write_tasks(
        path, [Task(f"t{n}", "x", f"What is {n} + 1?", str(n + 1), "maths") for n in range(count)]
    )
    return str(path)


def test_a_set_is_split_disjointly_and_keeps_its_verifier(tmp_path):
    config = TaskSourceConfig(name="mine", uri=a_set(tmp_path, 10), num_rl=6, num_heldout=3)
    splits = make_tasks([config], seed=1)
    assert (len(splits.rl), len(splits.heldout), splits.sft) == (6, 3, ())
    assert num_shared_prompts(splits) == 0
    assert {(t.source, t.verifier) for t in splits.rl} == {("mine", "maths")}
    assert all(t.reference == str(int(t.prompt.split()[2]) + 1) for t in splits.rl)
    assert make_tasks([config], seed=1) == splits
    assert make_tasks([config], seed=2).rl != splits.rl


def test_a_set_with_too_few_tasks_says_how_many_it_has(tmp_path):
    config = TaskSourceConfig(name="mine", uri=a_set(tmp_path, 4), num_rl=6)
    with pytest.raises(M1Error, match=r"needs 6 .*gave 4 \(4 kept\)"):
        make_tasks([config], seed=1)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "neither dataset nor uri"),
        ({"dataset": "chain_sum", "uri": "x"}, "both dataset and uri"),
        ({"uri": "x", "num_sft": 3}, "no worked solutions"),
    ],
)
def test_an_entry_names_a_generator_or_a_set(fields, said):
    with pytest.raises(ValidationError, match=said):
        TaskSourceConfig(name="mine", **fields)
