"""Rule rewards: is the final answer right, and is each tag there exactly once, in order."""

from m1.config.schema import RewardConfig
from m1.rewards.format import extract_answer
from m1.rewards.reasoning_gym import accepts, scorer
from m1.types import Reward, Task


def score(task: Task, text: str, config: RewardConfig) -> Reward:
    """Reward of a completion's text (paper sec. 4.1: final correctness with a format reward).

    Args:
        task: The task, whose `verifier` is "reasoning_gym:<dataset>".
        text: The completion with its tags, without the end-of-turn token.
        config: Weights of the parts.

    Returns:
        total = correctness weight * accuracy + format weight * format, each part 0 or 1. An error
        inside the verifier marks the rollout failed.
    """
    scorer(task)  # an unknown verifier is the recipe's mistake, not the rollout's
    answer = extract_answer(text)
    formatted = answer is not None
    try:
        accuracy = float(answer is not None and accepts(task, answer))
    except Exception as error:  # verifiers raise what they like; a fault is not a reward of 0
        return Reward(0.0, 0.0, {"verifier_error": 1.0, type(error).__name__: 1.0}, is_failed=True)
    total = config.correctness * accuracy + config.format * float(formatted)
    return Reward(total, accuracy, {"correctness": accuracy, "format": float(formatted)})


def is_correct(task: Task, answer: str) -> bool:
    """Whether the answer solves the task."""
    return accepts(task, answer)
