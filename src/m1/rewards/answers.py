"""What a completion finally says: without its thinking, inside its answer tags."""

import re

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def final_text(completion: str) -> str | None:
    """The text to judge, or None when the thinking never ended.

    What follows the last `</think>`, or the whole where there is no thinking; of that the last
    `<answer>` element, if there is one. A plain answer is its own final text.
    """
    _, is_closed, rest = completion.rpartition("</think>")
    if not is_closed and "<think>" in completion:
        return None
    elements = _ANSWER.findall(rest)
    return elements[-1].strip() if elements else rest.strip()
