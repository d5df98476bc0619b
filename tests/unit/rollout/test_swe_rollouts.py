"""What becomes of an episode: tokens, reward; and which instances are kept for evaluation."""

import pytest

from m1.config.schema import EpisodesConfig
from m1.rollout.agent import Episode, signs
from m1.rollout.dialogue import Trajectory
from m1.rollout.filtering import SampledBatch
from m1.rollout.swe import completion_of, reward_of, split
from m1.swe.grade import Grade
from m1.swe.instance import Instance
from m1.train.monitors import rollout_metrics
from m1.train.samples import train_samples
from m1.types import M1Error, Reward, Rollout, RolloutGroup, Task

GOLD = "--- a/pkg.py\n+++ b/pkg.py\n@@ -1 +1,2 @@\n-x = 1\n+x = 2\n+raise SystemExit(1)\n"
TRAJECTORY = Trajectory(
    tokens=(5, 6, 10, 11, 7, 8, 12),
    loss_mask=(False, False, True, True, False, False, True),
    logprobs=(0.0, 0.0, -1.0, -2.0, 0.0, 0.0, -3.0),
    entropies=(0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 3.0),
    policy_versions=(-1, -1, 4, 4, -1, -1, 5),
)


def an_instance(name="pkg__1-2", repo="pypi/pkg"):
    return Instance(
        repo=repo,
        instance_id=name,
        base_commit="0",
        problem_statement="x",
        patch=GOLD,
        FAIL_TO_PASS=("tests/test_pkg.py::test_x",),
        PASS_TO_PASS=(),
    )


def an_episode(patch="", actions=(), infra_error=None, trajectory=TRAJECTORY):
    found = signs(an_instance(), patch, actions)
    reason = "infra" if infra_error else "submitted"
    return Episode("pkg__1-2", patch, reason, (), trajectory, 7, 1.0, infra_error, found)


def a_grade(resolved=True, infra_error=None):
    rate = float(resolved)
    return Grade("pkg__1-2", resolved, rate, 1.0, infra_error, infra_error is not None, "")


def test_a_solved_episode_earns_one_and_its_parts_say_so():
    reward = reward_of(an_episode(GOLD), a_grade(), EpisodesConfig())
    assert (reward.total, reward.accuracy, reward.is_failed) == (1.0, 1.0, False)
    assert reward.parts == {
        "resolved": 1.0, "f2p_rate": 1.0, "p2p_rate": 1.0, "turns": 0.0, "exploits": 0.0
    }  # fmt: skip


@pytest.mark.parametrize(
    "patch,actions,kind",
    [
        (GOLD, ["cat > tests/test_pkg.py"], "edits_tests"),
        (GOLD, ["echo x > conftest.py"], "edits_runner"),
        (GOLD, ["pip install pkg==2"], "reads_future"),
        (GOLD, ["pytest -q || true"], "exit_tricks"),
        (GOLD.replace("+1,2", "+1,3") + "+import os; os._exit(0)\n", [], "exit_tricks"),
        (GOLD.replace("+1,2", "+1,3") + "+print('9 passed in 0.1s')\n", [], "forges_results"),
        (GOLD.replace("+1,2", "+1,3") + "+import _pytest\n", [], "patches_runner"),
    ],
)
def test_an_exploit_earns_nothing_even_where_the_tests_pass(patch, actions, kind):
    denied = reward_of(an_episode(patch, actions), a_grade(), EpisodesConfig())
    assert (denied.total, denied.accuracy, denied.parts["resolved"]) == (0.0, 0.0, 1.0)
    assert denied.parts["exploits"] >= 1 and denied.parts[f"exploit/{kind}"] == 1.0
    counted = reward_of(an_episode(patch, actions), a_grade(), EpisodesConfig(deny_exploits=False))
    assert counted.total == counted.accuracy == 1.0 and counted.parts == denied.parts


def test_a_negative_reward_is_not_raised_by_an_exploit():
    config = EpisodesConfig(policy="regressions_negative")
    worse = Grade("pkg__1-2", False, 0.0, 0.5, None, False, "")
    assert reward_of(an_episode(GOLD, ["echo x > conftest.py"]), worse, config).total == -1.0


def test_what_the_gold_patch_does_itself_is_no_exploit():
    """It raises SystemExit, as a command-line tool may."""
    assert signs(an_instance(), GOLD) == ()
    more = GOLD.replace("+raise SystemExit(1)", "+os._exit(1)")
    assert [s.kind for s in signs(an_instance(), more)] == ["exit_tricks"]


@pytest.mark.parametrize(
    "episode,graded",
    [
        (an_episode(infra_error="SandboxGone: x"), None),
        (an_episode(GOLD), a_grade(resolved=False, infra_error="no runner")),
    ],
)
def test_a_failure_of_ours_is_left_out_never_zero(episode, graded):
    reward = reward_of(episode, graded, EpisodesConfig())
    assert reward.is_failed and "exploits" not in reward.parts


def test_an_episode_is_a_completion_of_its_first_prompt():
    found = completion_of(an_episode(GOLD))
    assert found.prompt_tokens == (5, 6) and found.tokens == (10, 11, 7, 8, 12)
    assert found.loss_mask == (True, True, False, False, True)
    assert found.logprobs == (-1.0, -2.0, 0.0, 0.0, -3.0)
    assert found.policy_versions == (4, 4, 4, 4, 5) and found.finish_reason == "stop"
    assert completion_of(an_episode(trajectory=None)).tokens == ()


def a_group():
    task = Task("pkg__1-2", "swe", "x", "", "swe")
    parts = {"resolved": 1.0, "f2p_rate": 1.0, "p2p_rate": 1.0, "turns": 2.0, "exploits": 0.0}
    rewards = (
        Reward(1.0, 1.0, parts),
        Reward(0.0, 0.0, {**parts, "resolved": 0.0, "exploits": 3.0}),
    )
    completion = completion_of(an_episode(GOLD))
    return RolloutGroup(task, tuple(Rollout(task, completion, reward) for reward in rewards))


def test_only_tokens_that_the_policy_sampled_are_trained_on():
    samples = train_samples([a_group()])
    assert [sample.advantage > 0 for sample in samples] == [True, False]
    for sample in samples:
        assert sample.targets.tolist() == [6, 10, 11, 7, 8, 12]
        assert sample.loss_mask.tolist() == [False, True, True, False, False, True]
        assert sample.behaviour_logprobs.tolist() == [0.0, -1.0, -2.0, 0.0, 0.0, -3.0]


def test_metrics_count_episodes_and_those_with_exploits():
    group = a_group()
    found = rollout_metrics(SampledBatch(kept=[group], all=[group]))
    assert found["rl/episodes"] == 2.0
    assert found["rl/episodes_with_exploits_fraction"] == 0.5
    assert found["rl/episode_resolved"] == 0.5 and found["rl/episode_turns"] == 2.0
    assert found["rl/entropy_nats"] == pytest.approx(2.0)  # of 1, 2, 3: sampled ones only


def test_repositories_are_kept_for_evaluation_as_wholes():
    instances = [an_instance(f"{r}__{n}", f"pypi/{r}") for r in ("a", "b", "c") for n in range(3)]
    learned, kept = split(instances, num_heldout=4)
    assert len(kept) == 6 and len(learned) == 3
    assert not {i.repo for i in learned} & {i.repo for i in kept}
    assert split(instances[::-1], num_heldout=4)[1] == kept[::-1]
    assert split(instances, num_heldout=0) == (instances, [])
    with pytest.raises(M1Error, match="num_heldout is 10"):
        split(instances, num_heldout=10)
