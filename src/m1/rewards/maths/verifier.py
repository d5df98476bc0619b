"""The verifier `maths`: a final answer against the reference (paper sec. 4.1)."""

from m1.rewards.maths.equivalence import compare
from m1.rewards.maths.extraction import MAX_ANSWER_CHARACTERS, extract
from m1.types import Task, Verdict


def verify(task: Task, completion: str) -> Verdict:
    """1 when the completion's final answer equals the reference; the reason says what decided.

    Runs in a worker process: nothing here bounds its own time (see `m1.rewards.service`).
    """
    extracted = extract(completion)
    if extracted.text is None:
        return Verdict(0.0, extracted.how)
    found = compare(reference_answer(task.reference), extracted.text)
    reason = found.reason if found.is_equal else f"different: {found.reason}"
    return Verdict(float(found.is_equal), reason, {f"from_{extracted.how}": 1.0})


def reference_answer(reference: str) -> str:
    """The answer inside a reference that may be a whole solution."""
    extracted = extract(reference)
    if extracted.text is not None and len(reference) > 0:
        return extracted.text
    return reference[-MAX_ANSWER_CHARACTERS:]
