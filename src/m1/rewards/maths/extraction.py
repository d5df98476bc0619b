"""Where the final answer of a mathematical solution stands."""

import re
from dataclasses import dataclass

from m1.rewards.answers import final_text

MAX_ANSWER_CHARACTERS = 2000
"""A longer answer is refused: no reference is that long, and parsers take quadratic time."""
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?=\{|[^\s{])")
_BETWEEN_BOXES = re.compile(r"[\s$,;.\\()]*(?:and|or|,|;)?[\s$,;.\\()]*", re.IGNORECASE)
_HASHES = re.compile(r"####[ \t]*(.+)")
_STATED = re.compile(
    r"(?:final\s+answer|answer|result|solution)\s*(?:\*\*)?\s*(?:is|are|:|=|equals)\s*:?\s*(?:\*\*)?"
    r"[ \t]*([^\n]+)",
    re.IGNORECASE,
)
_MATH = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_SENTENCE_END = re.compile(r"\.(?:\s|$)|(?<=[)\]$}])\s+(?:because|since|which)\b")
_SHORT = 200
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b-\u200f\u2028-\u202e\u2060\ufeff]")


@dataclass(frozen=True)
class Extracted:
    """The answer, or why there is none."""

    text: str | None
    how: str
    """`boxed`, `hashes`, `stated`, `whole`, or for None `no_answer`, `too_long`."""


def extract(completion: str) -> Extracted:
    """The final answer: last box, else `#### x`, else what is stated, else a short whole text.

    Boxes joined by nothing but `and`, `or` or a comma are one answer with several values. Control
    and invisible characters are removed, so they can neither hide nor split an answer.
    """
    final = final_text(completion)
    if final is None:
        return Extracted(None, "no_answer")
    # The answer stands at the end; what is far before it needs no scan.
    text = _CONTROL.sub("", final[-20 * MAX_ANSWER_CHARACTERS :])
    found, how = _boxed(text), "boxed"
    if found is None and (hashes := _HASHES.findall(text)):
        found, how = hashes[-1], "hashes"
    if found is None and (stated := _STATED.findall(text)):
        found, how = _clause(stated[-1]), "stated"
    if found is None and len(text) == len(_CONTROL.sub("", final)) and "\n" not in text.strip():
        found, how = text, "whole"
    if found is None or not found.strip():
        return Extracted(None, "no_answer")
    if how == "whole" and len(found) > _SHORT and not _MATH.fullmatch(found.strip()):
        return Extracted(None, "too_long" if len(found) > MAX_ANSWER_CHARACTERS else "no_answer")
    if len(found) > MAX_ANSWER_CHARACTERS:
        return Extracted(None, "too_long")
    return Extracted(found.strip(), how)


def _boxed(text: str) -> str | None:
    boxes: list[tuple[int, int, str]] = []
    position = 0
    while (match := _BOX.search(text, position)) is not None:
        content, position = _content(text, match.end())
        boxes.append((match.start(), position, content))
    if not boxes:
        return None
    values = [boxes[-1][2]]
    for (_, end, content), (start, _, _) in zip(boxes[-2::-1], boxes[:0:-1], strict=False):
        between = text[end:start]
        is_joined = _BETWEEN_BOXES.fullmatch(between) and re.search("and|or|,|;", between, re.I)
        if len(between) > 20 or not is_joined:
            break
        values.insert(0, content)
    inner = [_boxed(value) if _BOX.search(value) else value for value in values]
    return ", ".join(value for value in inner if value is not None)


def _content(text: str, start: int) -> tuple[str, int]:
    """What a box holds, and where it ends; a box that is never closed ends with its line."""
    if text[start] != "{":
        token = re.compile(r"\\[A-Za-z]+|\S").match(text, start)
        assert token
        return token.group(), token.end()
    depth = 0
    for position in range(start, len(text)):
        character = text[position]
        is_escaped = position > 0 and text[position - 1] == "\\"
        if character == "{" and not is_escaped:
            depth += 1
        elif character == "}" and not is_escaped:
            depth -= 1
            if depth == 0:
                return text[start + 1 : position], position + 1
    line_end = text.find("\n", start)
    end = len(text) if line_end < 0 else line_end
    rest = text[start + 1 : end].strip()
    return re.sub(r"[\s.]*\$+[\s.]*$", "", rest), end


def _clause(text: str) -> str:
    """Of a sentence that states an answer, the answer."""
    text = text.strip().strip("*").strip()
    match = _MATH.match(text)
    if match:
        return next(group for group in match.groups() if group is not None)
    end = _SENTENCE_END.search(text)
    return (text[: end.start()] if end else text).strip().strip("*")
