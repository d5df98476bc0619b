import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m1.data.logic.catalogue import LOGIC_TASKS
from m1.data.tasks import read_tasks, write_tasks
from m1.data.tasks.layouts import LAYOUTS
from m1.data.tasks.loading import load_layout
from m1.rewards.registry import load
from m1.sandbox import bubblewrap
from m1.types import M1Error

SAMPLES = Path(__file__).with_name("layouts")
EXPECTED = {  # number of tasks, and why other rows are none
    "gsm8k": (1, {"no_final_answer": 1}),
    "math": (1, {"no_final_answer": 1}),
    "aime": (1, {"no_final_answer": 1}),
    "dapo": (1, {}),
    "synlogic": (
        6,
        {
            "star_placement_puzzle: several_stars": 1,
            "campsite: tents_beside_exactly_one_tree": 1,
            "unknown_puzzle": 1,
            "malformed_ValueError": 1,
            "no_game_data": 1,
        },
    ),
    "livecodebench": (2, {"unreadable_private_tests": 1}),
    "apps": (2, {"no_tests": 1}),
    "taco": (1, {}),
    "ifeval": (1, {"no_instructions": 1}),
    "ifbench": (1, {}),
}
SOLUTIONS = {
    "gsm8k": ["#### 1234"],
    "math": [r"\boxed{0.75}"],
    "aime": ["The answer is 43."],
    "dapo": ["Answer: 9"],
    "livecodebench": [
        "print(sum(map(int, input().split())))",
        "class Solution:\n    def largest(self, xs, n): return max(xs)",
    ],
    "apps": ["print(2 * int(input()))", "def twice(x): return 2 * x"],
    "taco": ["print(*reversed(input().split()))"],
    "ifeval": ["It rains. It pours."],
    "ifbench": ["civic level radar kayak madam refer rotor stats tenet rotator"],
}


def loaded(layout):
    return load_layout(layout, str(SAMPLES / f"{layout}.jsonl"))


def test_every_layout_has_a_sample():
    assert sorted(EXPECTED) == sorted(LAYOUTS)


@pytest.mark.parametrize("layout", EXPECTED)
def test_rows_become_tasks_and_others_are_counted(layout):
    found = loaded(layout)
    assert (len(found.tasks), found.skipped) == EXPECTED[layout]
    assert all(task.domain and task.prompt and task.reference for task in found.tasks)


@pytest.mark.parametrize("layout", SOLUTIONS)
def test_the_verifier_accepts_a_solution_and_rejects_another_text(layout):
    if loaded(layout).tasks[0].verifier == "code" and bubblewrap.failure():
        pytest.skip(bubblewrap.failure())
    for task, solution in zip(loaded(layout).tasks, SOLUTIONS[layout], strict=True):
        verify = load(task.verifier)
        assert verify(task, solution).accuracy == 1
        assert verify(task, "I do not know, sorry.").accuracy == 0


def test_the_instructions_around_a_dapo_problem_are_removed():
    assert loaded("dapo").tasks[0].prompt == "How many divisors has 36?"


def test_private_tests_are_read_without_unpickling(tmp_path):
    tests = json.loads(loaded("livecodebench").tasks[0].reference)["tests"]
    assert tests[1] == {"input": "5 6\n", "output": "11\n"}
    assert not Path("/tmp/m1_pickle").exists()


SYNLOGIC = {task.verifier.partition(":")[2]: task for task in loaded("synlogic").tasks}


@pytest.mark.parametrize("name", SYNLOGIC)
@pytest.mark.parametrize(
    "form", ["{}", "I think so.\n```python\n{}\n```", "<think>[[1]]</think><answer>{}</answer>"]
)
def test_a_synlogic_answer_in_its_own_layout_is_accepted(name, form):
    task = SYNLOGIC[name]
    assert load(task.verifier)(task, form.format(task.reference)).accuracy == 1


@pytest.mark.parametrize("name", SYNLOGIC)
def test_a_synlogic_answer_with_any_cell_changed_is_rejected(name):
    """The samples have one solution each; a changed number or mark is another grid."""
    task, num_tried = SYNLOGIC[name], 0
    for place, mark in enumerate(task.reference):
        for other in "123456789X":
            if mark in "123456789X" and other != mark:
                changed = task.reference[:place] + other + task.reference[place + 1 :]
                assert load(task.verifier)(task, changed).accuracy == 0, changed
                num_tried += 1
    assert num_tried >= 36


@pytest.mark.parametrize(
    "text",
    ["", "[]", "[[]]", "[[", "]]" * 5000, "[" * 5000, "{}", "{(1, 2)" * 3000, "((", "no idea",
     "[[__import__('os').abort()]]", "[[9, 9], [9]]", "[[1.5, 2], [2, 1]]"],
)  # fmt: skip
def test_junk_is_no_synlogic_answer(text):
    for task in SYNLOGIC.values():
        assert load(task.verifier)(task, text).accuracy == 0


def test_rows_between_commas_are_read_as_futoshiki_asks():
    task = SYNLOGIC["futoshiki"]
    rows = ",".join(" ".join(map(str, row)) for row in json.loads(task.reference))
    assert load(task.verifier)(task, f"The answer is [[{rows}]].").accuracy == 1


def test_synlogic_names_all_tasks_of_ours_or_why_not():
    from m1.data.tasks.synlogic import _MAPPED, _OTHER

    assert not set(_MAPPED) & set(_OTHER)
    assert {name for name, _ in _MAPPED.values()} <= set(LOGIC_TASKS)


def test_a_folder_of_parquet_and_json_is_read_in_order(tmp_path):
    rows = [json.loads(line) for line in (SAMPLES / "gsm8k.jsonl").open()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.txt").write_text("no data")
    found = load_layout("gsm8k", str(tmp_path))
    assert (len(found.tasks), found.skipped) == (2, {"no_final_answer": 2})
    assert len(load_layout("gsm8k", str(tmp_path), max_tasks=1).tasks) == 1


@pytest.mark.parametrize(
    ("layout", "uri", "message"),
    [
        ("gsm9k", ".", "'gsm9k' is not known; known: aime, apps"),
        ("gsm8k", "/nowhere", "neither a file nor a folder"),
    ],
)
def test_what_cannot_be_read_is_refused(layout, uri, message):
    with pytest.raises(M1Error, match=message):
        load_layout(layout, uri)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(M1Error, match="holds no file that ends in"):
        load_layout("gsm8k", str(tmp_path))


@pytest.mark.parametrize("name", ["tasks.jsonl", "tasks.parquet"])
def test_files_give_back_what_was_written(tmp_path, name):
    tasks = [task for layout in EXPECTED for task in loaded(layout).tasks]
    write_tasks(tmp_path / name, tasks)
    assert read_tasks(tmp_path / name) == tasks


def test_a_line_that_is_no_task_is_named(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"task_id": "a", "surprise": 1}\n')
    with pytest.raises(M1Error, match=r"line 1 is no task: .*source.*surprise"):
        read_tasks(path)
