"""Rule rewards: is the final answer right, and is each tag there exactly once, in order."""

from m1.config.schema import RewardConfig
from m1.data.logic.catalogue import logic_task
from m1.data.tasks.drawing import LOGIC_PREFIX
from m1.rewards.format import extract_answer
from m1.rewards.logic import verify as verify_logic
from m1.rewards.reasoning_gym import accepts, scorer
from m1.rewards.service.pool import Judgement
from m1.types import Reward, Task


def score(task: Task, text: str, config: RewardConfig) -> Reward:
    """Reward of a completion's text (paper sec. 4.1: final correctness with a format reward).

    Args:
        task: The task, whose `verifier` is "reasoning_gym:<dataset>" or "logic:<task>": these
            are quick and safe enough to run here. All others need the reward service.
        text: The completion with its tags, without the end-of-turn token.
        config: Weights of the parts.

    Returns:
        total = correctness weight * accuracy + format weight * format, each part 0 or 1. An error
        inside the verifier marks the rollout failed.
    """
    _require_local(task)  # an unknown verifier is the recipe's mistake, not the rollout's
    answer = extract_answer(text)
    formatted = answer is not None
    try:
        accuracy = float(answer is not None and is_correct(task, answer))
    except Exception as error:  # verifiers raise what they like; a fault is not a reward of 0
        return Reward(0.0, 0.0, {"verifier_error": 1.0, type(error).__name__: 1.0}, is_failed=True)
    total = config.correctness * accuracy + config.format * float(formatted)
    return Reward(total, accuracy, {"correctness": accuracy, "format": float(formatted)})


def is_correct(task: Task, answer: str) -> bool:
    """Whether the answer solves the task."""
    if task.verifier.startswith(LOGIC_PREFIX):
        return verify_logic(task, answer).accuracy == 1
    return accepts(task, answer)


def reward_of(judgement: Judgement, text: str, config: RewardConfig) -> Reward:
    """The reward of what the service said; an infrastructure error marks the rollout failed."""
    if judgement.verdict is None:
        name = (judgement.infra_error or "unknown").partition(":")[0]
        return Reward(0.0, 0.0, {"infra_error": 1.0, name: 1.0}, is_failed=True)
    formatted = float(extract_answer(text) is not None)
    accuracy = judgement.verdict.accuracy
    total = config.correctness * accuracy + config.format * formatted
    parts = {**judgement.verdict.parts, "correctness": accuracy, "format": formatted}
    return Reward(total, accuracy, parts)


def _require_local(task: Task) -> None:
    if task.verifier.startswith(LOGIC_PREFIX):
        logic_task(task.verifier.removeprefix(LOGIC_PREFIX))
    else:
        scorer(task)
