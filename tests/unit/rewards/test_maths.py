import time

import pytest

from m1.rewards.maths.equivalence import compare
from m1.rewards.maths.extraction import MAX_ANSWER_CHARACTERS, extract
from m1.rewards.maths.verifier import verify
from m1.types import Task


def task(reference):
    return Task("t", "s", "q", reference, "maths")


@pytest.mark.parametrize(
    ("completion", "answer", "how"),
    [
        (r"first \boxed{1}, at last \boxed{2}", "2", "boxed"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}", "boxed"),
        (r"\boxed{a\}b}", r"a\}b", "boxed"),
        (r"\boxed{\boxed{3}}", "3", "boxed"),
        (r"\boxed 7", "7", "boxed"),
        (r"\fbox{7}", "7", "boxed"),
        ("\\boxed{7\nmore", "7", "boxed"),
        (r"\boxed{1} or \boxed{2}", "1, 2", "boxed"),
        (r"\boxed{1} is wrong, and \boxed{2}", "2", "boxed"),
        ("5 + 2 = 7\n#### 7", "7", "hashes"),
        ("The answer is $7$ since 3 + 4.", "7", "stated"),
        ("**Answer:** 12 apples. Because.", "12 apples", "stated"),
        ("7", "7", "whole"),
        (r"<think>\boxed{9}</think>\boxed{7}", "7", "boxed"),
        (r"<think>9</think><answer>7</answer>", "7", "whole"),
    ],
)
def test_the_final_answer_is_found(completion, answer, how):
    extracted = extract(completion)
    assert (extracted.text, extracted.how) == (answer, how)


@pytest.mark.parametrize(
    "completion",
    ["", "   ", "<think>\\boxed{7}", "so many words\nand never an end", "<answer></answer>"],
)
def test_a_completion_without_a_final_answer_has_none(completion):
    assert extract(completion).text is None


def test_control_and_invisible_characters_cannot_hide_a_digit():
    assert extract("\\boxed{1\u200b2\x00}").text == "12"


def test_an_answer_of_a_megabyte_is_refused_at_once():
    started = time.monotonic()
    assert verify(task("7"), "\\boxed{" + "7" * 1_000_000 + "}").accuracy == 0
    assert verify(task("7"), "\\boxed{" + "7" * 10_000 + "}").reason == "too_long"
    assert verify(task("7"), "7 " * 500_000).accuracy == 0
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("digits", ["9**9**9", "9^{9^{9}}", "1000000!", "2^{99999999}"])
def test_what_would_take_forever_to_evaluate_is_compared_as_text_only(digits):
    started = time.monotonic()
    assert not compare("1", digits).is_equal
    assert compare(digits, digits).is_equal
    assert time.monotonic() - started < 1


def test_400_nested_brackets_do_no_harm():
    started = time.monotonic()
    assert (
        verify(task("7"), f"\\boxed{{{'(' * 400}7{')' * 400}}}").reason == "different: too_nested"
    )
    assert time.monotonic() - started < 1


def test_a_restated_problem_is_no_answer():
    assert compare("2", r"2^{10} \bmod 7").reason == "unevaluated_remainder"


def test_the_reason_says_what_decided():
    reasons = {
        ("5 cm", "5 m"): "different: quantity",
        ("1,2", "2,1"): "list",
        ("x+1", "1+x"): "expression",
        (r"\sqrt{2}", "1.414214"): "rounded",
        ("7", "7"): "equal_text",
    }
    for (reference, answer), reason in reasons.items():
        assert verify(task(reference), answer).reason == reason


def test_a_rounded_decimal_needs_six_places():
    assert compare(r"\frac{1}{3}", "0.333333").is_equal
    assert not compare(r"\frac{1}{3}", "0.33333").is_equal
    assert not compare(r"\frac{1}{3000000}", "0.000000").is_equal


def test_a_reference_may_be_a_whole_solution():
    assert verify(task("We add: 3 + 4 = 7.\n#### 7"), r"\boxed{7}").accuracy == 1


def test_maximum_answer_length_is_counted_after_extraction():
    padding = "thinking aloud\n" * MAX_ANSWER_CHARACTERS
    assert verify(task("7"), padding + r"\boxed{7}").accuracy == 1
