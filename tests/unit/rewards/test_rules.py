from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m1.config.schema import RewardConfig
from m1.data.logic.catalogue import logic_task
from m1.rewards.format import extract_answer
from m1.rewards.rules import is_correct, reward_of, score
from m1.rewards.service.pool import Judgement
from m1.types import M1Error, Task, Verdict

TASK = Task(
    task_id="sum",
    source="sums",
    prompt="1 + 2 =",
    reference="3",
    verifier="reasoning_gym:chain_sum",
)
CONFIG = RewardConfig(correctness=2.0, format=0.25)
UNTAGGED = st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=20)


def reply(answer, think="one and two"):
    return f"<think>{think}</think><answer>{answer}</answer>"


@given(UNTAGGED, UNTAGGED)
def test_a_well_formed_completion_gives_its_answer_stripped(think, answer):
    assert extract_answer(reply(answer, think)) == answer.strip()


@pytest.mark.parametrize(
    "text",
    [
        " \n<think>a</think> \n <answer>3</answer>\n",
        "<think>a\nb < c</think><answer>\n3\n</answer>",
        "<think></think><answer>3</answer>",
    ],
)
def test_white_space_around_the_parts_and_lines_inside_are_allowed(text):
    assert extract_answer(text) == "3"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("3", id="bare"),
        pytest.param("<answer>3</answer>", id="no think"),
        pytest.param("<think>a</think>", id="no answer"),
        pytest.param("<think>a<answer>3</answer>", id="think not closed"),
        pytest.param("<think>a</think><answer>3", id="answer not closed"),
        pytest.param("<answer>3</answer><think>a</think>", id="out of order"),
        pytest.param("<think>a<answer>3</answer></think>", id="answer inside think"),
        pytest.param("<think>a</think><answer><think>3</answer>", id="tag inside answer"),
        pytest.param("<think>a<think>b</think></think><answer>3</answer>", id="nested think"),
        pytest.param("<think>a</think></think><answer>3</answer>", id="closed twice"),
        pytest.param("<think>a</think><answer>2</answer><answer>3</answer>", id="two answers"),
        pytest.param("<think>a</think> so <answer>3</answer>", id="text between"),
        pytest.param("so <think>a</think><answer>3</answer>", id="text before"),
        pytest.param("<think>a</think><answer>3</answer> so", id="text after"),
        pytest.param("<THINK>a</THINK><answer>3</answer>", id="upper case"),
    ],
)
def test_a_malformed_completion_has_no_answer(text):
    assert extract_answer(text) is None


def test_a_right_answer_earns_both_parts():
    reward = score(TASK, reply("3"), CONFIG)
    assert (reward.total, reward.accuracy, reward.is_failed) == (2.25, 1.0, False)
    assert reward.parts == {"correctness": 1.0, "format": 1.0}


def test_a_wrong_answer_earns_the_format_alone():
    reward = score(TASK, reply("4"), CONFIG)
    assert (reward.total, reward.accuracy, reward.is_failed) == (0.25, 0.0, False)


def test_a_right_answer_without_tags_earns_nothing():
    reward = score(TASK, "3", CONFIG)
    assert (reward.total, reward.accuracy, reward.is_failed) == (0.0, 0.0, False)
    assert reward.parts == {"correctness": 0.0, "format": 0.0}


def test_an_empty_answer_is_well_formed_and_wrong():
    assert score(TASK, reply(""), CONFIG).total == 0.25


def test_partial_credit_of_the_verifier_is_not_correct():
    import reasoning_gym

    answer = "It is 3, surely"
    entry = {"question": TASK.prompt, "answer": TASK.reference, "metadata": {}}
    credit = reasoning_gym.get_score_answer_fn("chain_sum")(answer, entry)
    assert 0 < credit < 1
    assert not is_correct(TASK, answer)
    assert score(TASK, reply(answer), CONFIG).accuracy == 0.0


@pytest.mark.parametrize("verifier", ["reasoning_gym:no_such_dataset", "judge:model", ""])
@pytest.mark.parametrize("text", [reply("3"), "no tags at all"])
def test_an_unknown_verifier_is_a_mistake_of_the_recipe_and_not_a_failed_rollout(verifier, text):
    task = Task(task_id="x", source="s", prompt="p", reference="3", verifier=verifier)
    with pytest.raises(M1Error, match=f"task x names verifier '{verifier}'"):
        score(task, text, CONFIG)


def test_a_verifier_that_raises_marks_the_rollout_failed():
    task = Task("x", "s", "p", "3", "reasoning_gym:prime_factorization", {})
    reward = score(task, reply("junk"), CONFIG)  # reasoning-gym's own verifier raises on this
    assert reward.is_failed and (reward.total, reward.accuracy) == (0.0, 0.0)
    assert reward.parts["verifier_error"] == 1.0


def test_a_logic_task_is_scored_here():
    task = logic_task("sudoku").generate(1, 1)
    assert score(task, reply(task.reference), CONFIG).total == 2.25
    assert score(task, reply("1"), CONFIG).total == 0.25


def test_a_verifier_that_may_hang_needs_the_service():
    task = replace(TASK, verifier="maths")
    with pytest.raises(M1Error, match="verifier 'maths'"):
        score(task, reply("3"), CONFIG)
    judgement = Judgement(Verdict(1.0, "number", {"from_whole": 1.0}), None, 0.1)
    reward = reward_of(judgement, reply("3"), CONFIG)
    assert (reward.total, reward.accuracy, reward.is_failed) == (2.25, 1.0, False)


def test_an_infrastructure_error_marks_the_rollout_failed():
    reward = reward_of(Judgement(None, "worker_crashed", 0.1), reply("3"), CONFIG)
    assert (reward.total, reward.is_failed) == (0.0, True)
    assert reward.parts == {"infra_error": 1.0, "worker_crashed": 1.0}
