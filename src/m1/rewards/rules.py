"""Rule rewards: is the final answer right, and is each tag there exactly once, in order."""

import re
from functools import cache
from typing import Any

from m1.config.schema import RewardConfig
from m1.types import M1Error, Reward, Task

_FORMAT = re.compile(r"<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_RIGHT = 1.0
"""reasoning-gym grants partial scores below 1 to wrong answers; only a full score is correct."""


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
    verify = _verifier_of(task)  # an unknown verifier is the recipe's mistake, not the rollout's
    answer = extract_answer(text)
    formatted = answer is not None
    try:
        accuracy = float(answer is not None and _accepts(verify, task, answer))
    except Exception as error:  # verifiers raise what they like; a fault is not a reward of 0
        return Reward(0.0, 0.0, {"verifier_error": 1.0, type(error).__name__: 1.0}, is_failed=True)
    total = config.correctness * accuracy + config.format * float(formatted)
    return Reward(total, accuracy, {"correctness": accuracy, "format": float(formatted)})


def extract_answer(text: str) -> str | None:
    """The answer of a well-formed completion; None when a tag is missing, repeated or misplaced."""
    match = _FORMAT.fullmatch(text.strip())
    if match is None or any(text.count(tag) != 1 for tag in _TAGS):
        return None
    return match["answer"].strip()


def is_correct(task: Task, answer: str) -> bool:
    """Whether the answer solves the task."""
    return _accepts(_verifier_of(task), task, answer)


def _accepts(verify: Any, task: Task, answer: str) -> bool:
    entry = {"question": task.prompt, "answer": task.reference, "metadata": task.metadata}
    return bool(verify(answer, entry) >= _RIGHT)


def _verifier_of(task: Task) -> Any:
    kind, _, dataset = task.verifier.partition(":")
    verify = _verifier(dataset) if kind == "reasoning_gym" else None
    if verify is None:
        raise M1Error(
            f"task {task.task_id} names verifier {task.verifier!r}, which is not known; known: "
            "reasoning_gym:<dataset>"
        )
    return verify


@cache
def _verifier(dataset: str) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    return reasoning_gym.get_score_answer_fn(dataset) if dataset in DATASETS else None
