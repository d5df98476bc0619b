import json
from pathlib import Path

import pytest

from m1.rewards.maths.verifier import verify
from m1.types import Task

PAIRS = [
    json.loads(line)
    for line in Path(__file__).with_name("data").joinpath("maths_pairs.jsonl").open()
]
REQUIRED_ACCURACY = 0.99


def is_right(pair):
    task = Task("", "", "", pair["reference"], "maths")
    return verify(task, pair["answer"]).accuracy == (pair["label"] == "equal")


@pytest.fixture(scope="module")
def wrong():
    return [pair for pair in PAIRS if not is_right(pair)]


def test_the_corpus_holds_600_pairs_of_all_three_labels():
    labels = [pair["label"] for pair in PAIRS]
    assert len({(pair["reference"], pair["answer"]) for pair in PAIRS}) == len(PAIRS) >= 600
    assert min(labels.count(label) for label in ("equal", "different", "hostile")) >= 100


def test_verdicts_agree_with_the_hand_checked_pairs(wrong):
    shown = [(pair["reference"][:60], pair["answer"][:60]) for pair in wrong]
    assert 1 - len(wrong) / len(PAIRS) >= REQUIRED_ACCURACY, shown


def test_no_listed_false_positive_and_no_hostile_answer_is_accepted(wrong):
    accepted = [
        (pair["reference"][:60], pair["answer"][:60])
        for pair in wrong
        if pair["label"] != "equal" and (pair["category"] == "listed" or pair["label"] == "hostile")
    ]
    assert not accepted


def test_equality_does_not_depend_on_the_side_an_answer_stands_on():
    """Where the reference is no expression to be extracted from, the relation is symmetric."""
    one_way = {"extraction", "percent", "base", "listed", "units"}
    asymmetric = [
        (pair["reference"], pair["answer"])
        for pair in PAIRS
        if pair["label"] == "equal" and pair["category"] not in one_way
        if not verify(Task("", "", "", pair["answer"], "maths"), pair["reference"]).accuracy
    ]
    assert not asymmetric
