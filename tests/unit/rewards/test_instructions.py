import json

import pytest

from m1.rewards.instructions import verify
from m1.types import M1Error, Task


def task(*instructions, benchmark="ifeval", **extra):
    reference = {
        "instruction_id_list": [name for name, _ in instructions],
        "kwargs": [kwargs for _, kwargs in instructions],
        **extra,
    }
    return Task("t", "s", "Write.", json.dumps(reference), f"instructions:{benchmark}")


NO_COMMA = ("punctuation:no_comma", {})
WORDS = ("length_constraints:number_words", {"relation": "at least", "num_words": 3})


def test_all_constraints_must_hold_and_the_share_is_a_part():
    assert verify(task(NO_COMMA, WORDS), "one two three").accuracy == 1
    verdict = verify(task(NO_COMMA, WORDS), "one, two three")
    assert (verdict.accuracy, verdict.parts) == (0, {"share": 0.5})
    assert verdict.reason == "broken: punctuation:no_comma"


def test_thinking_is_not_part_of_the_answer():
    assert verify(task(NO_COMMA), "<think>a, b</think>one two").accuracy == 1
    assert verify(task(NO_COMMA), "<think>one two").accuracy == 0


def test_an_empty_answer_follows_nothing():
    assert verify(task(NO_COMMA), " ").reason == "no_answer"


def test_loose_mode_forgives_an_introduction():
    strict, loose = (task(NO_COMMA, mode=mode) for mode in ("strict", "loose"))
    text = "Sure, here it is:\none two"
    assert (verify(strict, text).accuracy, verify(loose, text).accuracy) == (0, 1)


def test_ifbench_checkers_are_known():
    palindromes = task(("words:palindrome", {}), benchmark="ifbench")
    assert verify(palindromes, "civic level radar kayak " * 4).accuracy == 1
    assert verify(palindromes, "no such words here").accuracy == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (task(("no:such", {})), r"unknown instructions \['no:such'\]"),
        (task(benchmark="ifeval"), "at least one"),
        (task(NO_COMMA, benchmark="other"), "instructions:other is not known"),
        (Task("t", "s", "q", "[]", "instructions:ifeval"), "not understood"),
    ],
)
def test_a_task_that_cannot_be_checked_is_an_error_and_no_zero(wrong, message):
    with pytest.raises(M1Error, match=message):
        verify(wrong, "text")
