from dataclasses import replace

import pytest
from pydantic import ValidationError

from m1.config.schema import RewardConfig
from m1.rollout.filtering import is_informative
from m1.rollout.groups import needs_service, shaped
from m1.rollout.replicas import Replicas
from tests.unit.rollout.making import rollout, task

CONFIG = RewardConfig(overlong=0.5, overlong_tokens=4)


@pytest.mark.parametrize(("length", "penalty"), [(6, 0.0), (8, -0.5), (10, -1.0)])
def test_long_completions_lose_reward_and_not_accuracy(length, penalty):
    made = rollout(1.0, total=1.1, tokens=tuple(range(length)))
    reward = shaped(made.reward, made.completion, CONFIG, max_tokens=10)
    assert reward.total == pytest.approx(1.1 + 0.5 * penalty)
    assert reward.accuracy == 1.0 and reward.parts == {"format": 1.0, "overlong": penalty}


def test_a_group_that_differs_in_length_alone_stays_uninformative():
    pair = [rollout(1.0, tokens=tuple(range(length))) for length in (2, 10)]
    rewards = [shaped(r.reward, r.completion, CONFIG, max_tokens=10) for r in pair]
    assert rewards[0].total != rewards[1].total
    assert not is_informative([reward.accuracy for reward in rewards])


def test_failed_rollouts_and_recipes_without_a_penalty_are_left_alone():
    failed = rollout(0.0, failed=True, tokens=tuple(range(10)))
    assert shaped(failed.reward, failed.completion, CONFIG, max_tokens=10) == failed.reward
    long = rollout(1.0, tokens=tuple(range(10)))
    assert shaped(long.reward, long.completion, RewardConfig(), max_tokens=10) == long.reward
    with pytest.raises(ValidationError, match="overlong_tokens"):
        RewardConfig(overlong=1.0)


@pytest.mark.parametrize(
    ("verifier", "expected"),
    [("logic:zebra", False), ("reasoning_gym:x", False), ("maths", True), ("code", True)],
)
def test_only_verifiers_that_may_hang_need_processes(verifier, expected):
    tasks = [replace(task("a"), verifier="logic:zebra"), replace(task("b"), verifier=verifier)]
    assert needs_service(tasks) is expected


def test_replicas_share_prompts_in_turn():
    items = list(range(7))
    parts = [Replicas(index=i, num=3, world=3).share(items) for i in range(3)]
    assert parts == [[0, 3, 6], [1, 4], [2, 5]]
    assert Replicas().gather(items) == items
