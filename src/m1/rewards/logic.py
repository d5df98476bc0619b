"""The verifier `logic:<task>`: judges the answer itself, not its likeness to the stored one."""

from m1.data.logic.catalogue import logic_task
from m1.rewards.answers import final_text
from m1.types import Task, Verdict


def verify(task: Task, completion: str) -> Verdict:
    """Whether the final text solves the puzzle in any valid way."""
    _, _, name = task.verifier.partition(":")
    judge = logic_task(name)
    answer = final_text(completion)
    return Verdict(0.0, "no_answer") if answer is None else judge.verify(task, answer)
