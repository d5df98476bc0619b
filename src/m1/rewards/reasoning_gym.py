"""reasoning-gym's own scorers as verifiers."""

from functools import cache
from typing import Any

from m1.rewards.answers import final_text
from m1.types import M1Error, Task, Verdict

_RIGHT = 1.0
"""reasoning-gym grants partial scores below 1 to wrong answers; only a full score is correct."""


def verify(task: Task, completion: str) -> Verdict:
    """Whether the final text gets reasoning-gym's full score; its partial score is a part."""
    score_answer = scorer(task)
    answer = final_text(completion)
    if answer is None or not answer.strip():
        return Verdict(0.0, "no_answer")
    entry = {"question": task.prompt, "answer": task.reference, "metadata": task.metadata}
    value = float(score_answer(answer, entry))
    is_right = value >= _RIGHT
    return Verdict(float(is_right), "right" if is_right else "wrong", {"reasoning_gym": value})


def accepts(task: Task, answer: str) -> bool:
    """Whether an answer, without tags, gets the full score; errors of the scorer rise."""
    entry = {"question": task.prompt, "answer": task.reference, "metadata": task.metadata}
    return bool(scorer(task)(answer, entry) >= _RIGHT)


def scorer(task: Task) -> Any:
    """The scoring function of the dataset that a task's verifier names."""
    kind, _, dataset = task.verifier.partition(":")
    found = _scorer(dataset) if kind == "reasoning_gym" else None
    if found is None:
        raise M1Error(
            f"task {task.task_id} names verifier {task.verifier!r}, which is not known; known: "
            "reasoning_gym:<dataset>"
        )
    return found


@cache
def _scorer(dataset: str) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    return reasoning_gym.get_score_answer_fn(dataset) if dataset in DATASETS else None
