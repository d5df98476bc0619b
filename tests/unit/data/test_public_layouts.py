import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
    "synlogic": (1, {"other_verifier_data": 1, "unknown_puzzle": 1}),
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


def test_a_synlogic_puzzle_of_ours_is_judged_by_our_verifier():
    (task,) = loaded("synlogic").tasks
    assert load(task.verifier)(task, task.reference).accuracy == 1


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
