import json

import pytest

from m1.swe import diffs
from m1.swe.instance import Environment, Instance, read_instances, write_instances
from m1.types import M1Error

BENCH = {
    "repo": "owner/name",
    "instance_id": "owner__name-1",
    "base_commit": "abc",
    "patch": "--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-1\n+2\n",
    "test_patch": "",
    "problem_statement": "It is wrong.",
    "hints_text": "",
    "created_at": "2024-01-01",
    "version": "1.0",
    "FAIL_TO_PASS": '["t.py::test_a"]',
    "PASS_TO_PASS": '["t.py::test_b", "t.py::test_c"]',
    "environment_setup_commit": "def",
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_swe_bench_rows_are_read_with_lists_written_as_texts(tmp_path):
    (found,) = read_instances(write(tmp_path / "b.jsonl", [BENCH]))
    assert found.fail_to_pass == ("t.py::test_a",)
    assert found.pass_to_pass == ("t.py::test_b", "t.py::test_c")
    assert found.provenance["kind"] == "swe-bench" and not found.is_runnable


def test_the_patch_of_swe_smith_makes_the_fault_and_is_turned_round(tmp_path):
    row = {
        "instance_id": "o__n.1.func_1",
        "repo": "swesmith/o__n.1",
        "patch": BENCH["patch"],
        "FAIL_TO_PASS": ["t.py::test_a"],
        "PASS_TO_PASS": [],
        "image_name": "registry/x",
    }
    (found,) = read_instances(write(tmp_path / "s.jsonl", [row]))
    assert diffs.apply(found.patch, {"x.py": b"2\n"}) == {"x.py": b"1\n"}
    assert found.environment.image == "registry/x"
    assert found.base_commit == "o__n.1.func_1"


def test_swe_rebench_rows_keep_their_licence_and_recipe(tmp_path):
    row = {
        **BENCH,
        "FAIL_TO_PASS": ["t.py::test_a"],
        "PASS_TO_PASS": ["t.py::test_b"],
        "license_name": "MIT License",
        "docker_image": "registry/y",
        "install_config": {"python": "3.9", "test_cmd": "pytest"},
    }
    (found,) = read_instances(write(tmp_path / "r.jsonl", [row]))
    assert found.license == "MIT License" and found.environment.image == "registry/y"
    assert found.provenance == {"kind": "swe-rebench", "install_config": row["install_config"]}


def test_our_own_rows_read_back_equal(tmp_path):
    instance = Instance(
        repo="pypi/x",
        instance_id="x__1-2",
        base_commit="c",
        problem_statement="p",
        patch=BENCH["patch"],
        fail_to_pass=("a::b",),
        pass_to_pass=(),
        license="MIT",
        provenance={"kind": "releases"},
        environment=Environment(tree="t", site="s", tests="u", unproven=("a::c",)),
    )
    write_instances(tmp_path / "i.jsonl", [instance])
    assert read_instances(tmp_path / "i.jsonl") == [instance]
    assert {"FAIL_TO_PASS", "PASS_TO_PASS"} <= json.loads((tmp_path / "i.jsonl").read_text()).keys()


@pytest.mark.parametrize(
    "row, message",
    [
        ({**BENCH, "FAIL_TO_PASS": "not json"}, "no JSON list"),
        ({k: v for k, v in BENCH.items() if k != "FAIL_TO_PASS"}, "FAIL_TO_PASS is missing"),
        ({**BENCH, "instance_id": "../../x"}, "instance_id"),
        ({k: v for k, v in BENCH.items() if k != "repo"}, "repo"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, message):
    with pytest.raises(M1Error, match=message):
        read_instances(write(tmp_path / "w.jsonl", [row]))
