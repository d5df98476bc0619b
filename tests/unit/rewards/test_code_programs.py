import json

import pytest

from m1.rewards.code.comparing import CheckerFailed, same_value
from m1.rewards.code.programs import find_program, has_compiler
from m1.rewards.code.verifier import verify
from m1.sandbox import bubblewrap
from m1.types import M1Error, Task

pytestmark = pytest.mark.skipif(
    bubblewrap.failure() is not None, reason=f"no sandbox here: {bubblewrap.failure()}"
)
SUM = "a, b = map(int, input().split())\nprint(a + b)"
SUMS = [{"input": f"{a} {b}", "output": f"{a + b}\n"} for a, b in ((1, 2), (5, 5), (-3, 1), (0, 0))]


def judge(source, tag="python", **suite):
    task = Task("t", "s", "q", json.dumps({"tests": SUMS, **suite}), "code")
    return verify(task, f"<think>hm</think>Here:\n```{tag}\n{source}\n```\nDone.")


def test_a_program_that_passes_all_tests_is_right():
    verdict = judge(SUM)
    assert (verdict.accuracy, verdict.reason) == (1, "all_passed")
    assert verdict.parts == {"pass_rate": 1.0, "num_tests": 4.0}


def test_a_program_that_passes_some_tests_gets_nothing_but_its_pass_rate():
    verdict = judge("a, b = map(int, input().split())\nprint(abs(a) + b)")
    assert (verdict.accuracy, verdict.parts["pass_rate"]) == (0, 0.75)
    assert verdict.reason == "wrong_answer: 3 passed, 1 wrong_answer"


@pytest.mark.skipif(not has_compiler(), reason="no g++")
def test_cpp_is_compiled_and_run():
    source = (
        "#include <iostream>\nint main() { long a, b; std::cin >> a >> b; std::cout << a + b; }"
    )
    assert judge(source, "cpp").accuracy == 1
    assert judge("int main() { return 0 }", "cpp").reason.startswith("compile_error: ")
    assert judge('#include "/etc/shadow"\nint main() {}', "cpp").accuracy == 0


def test_functions_and_methods_are_called_with_json_arguments():
    tests = [
        {"input": [[3, 1, 2], True], "output": [3, 2, 1]},
        {"input": [[], False], "output": []},
    ]
    source = "def order(xs, down):\n    print('noise')\n    return sorted(xs, reverse=down)"
    assert judge(source, kind="function", function="order", tests=tests).accuracy == 1
    method = "class Solution:\n    def order(self, xs, down): return tuple(sorted(xs)[::-1])"
    assert judge(method, kind="function", function="Solution.order", tests=tests).accuracy == 1
    wrong = "def order(xs, down): return xs"
    assert judge(wrong, kind="function", function="order", tests=tests).parts["pass_rate"] == 0.5


def test_floats_are_compared_to_the_tolerance():
    tests = [{"input": "3", "output": "0.333333333"}]
    source = "print(1 / int(input()))"
    assert judge(source, tests=tests).accuracy == 0
    assert judge(source, tests=tests, comparison="float", tolerance=1e-6).accuracy == 1
    assert judge("print('nan')", tests=tests, comparison="float").accuracy == 0


def test_exact_comparison_minds_white_space():
    tests = [{"input": "", "output": "a  b\n"}]
    assert judge("print('a b')", tests=tests).accuracy == 1
    assert judge("print('a b')", tests=tests, comparison="exact").accuracy == 0
    assert judge("print('a  b', end='')", tests=tests, comparison="exact").accuracy == 1


CHECKER = """
def check(input, expected, actual):
    a, b = map(int, actual.split())
    return a + b == int(input)
"""


def test_a_checker_accepts_any_valid_output():
    suite = {
        "tests": [{"input": "7", "output": "3 4"}],
        "comparison": "checker",
        "checker": CHECKER,
    }
    assert judge("print(1, 6)", **suite).accuracy == 1
    assert judge("print(1, 7)", **suite).accuracy == 0


def test_a_checker_that_fails_is_no_verdict():
    suite = {"tests": [{"input": "7", "output": ""}], "comparison": "checker", "checker": CHECKER}
    with pytest.raises(CheckerFailed, match="ValueError"):
        judge("print('x y')", **suite)


def test_the_expected_output_is_nowhere_in_the_sandbox():
    source = (
        "import os\nfor p in ('/work', '/tmp'):\n  for f in os.listdir(p):\n"
        "    text = open(os.path.join(p, f)).read()\n    if '9' * 9 in text: print('9' * 9)"
    )
    hidden = [{"input": "", "output": "999999999"}]
    assert judge(source.replace("'9' * 9", "'99999' + '9999'"), tests=hidden).accuracy == 0


def test_the_last_block_is_the_program():
    text = "```python\nprint(1)\n```\nor\n```c++\nint main(){}\n```"
    assert find_program(text, "python").language == "cpp"
    assert find_program("print(1)", "python").source == "print(1)"
    assert find_program("<think>```python\nprint(1)\n```", "python") is None


@pytest.mark.parametrize(
    ("expected", "actual", "same"),
    [
        (1, 1.0, True),
        (1, True, False),
        ([1, [2]], [1, [2]], True),
        ([1], [1, 1], False),
        ({"a": 0.1}, {"a": 0.1 + 1e-9}, True),
        ("1", 1, False),
        (None, 0, False),
        (float("inf"), 1e308, False),
    ],
)
def test_values_are_compared_by_type_and_content(expected, actual, same):
    assert same_value(expected, actual, 1e-6) is same


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ({"tests": []}, "at least 1 item"),
        ({"kind": "function"}, "add it"),
        ({"comparison": "checker"}, "give both"),
        ({"tests": [{"input": [1], "output": "1"}]}, "compares text"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_reference_that_is_no_suite_is_an_error_and_no_zero(suite, message):
    with pytest.raises(M1Error, match=message):
        judge(SUM, **suite)
