"""Filters on single tasks: each a pure function that names a fault or returns None."""

import re
from collections.abc import Callable

from m1.rewards.maths.equivalence import compare
from m1.rewards.maths.extraction import MAX_ANSWER_CHARACTERS
from m1.rewards.maths.verifier import reference_answer
from m1.types import Task

_MIN_CHARACTERS = 20
_MISSING_FIGURE = re.compile(
    r"\[asy\]|\\includegraphics|<img|!\[|\b(?:shown|given|see|as) (?:in|the) (?:the )?"
    r"(?:figure|diagram|picture|graph|table|image)\b|\b(?:figure|diagram|picture) (?:below|above)\b"
    r"|\bin the (?:figure|diagram|picture)\b",
    re.IGNORECASE,
)
_CUT = re.compile(r"(?:\.\.\.|…|[,;:(\[{]|\b(?:and|or|the|of|is|that|with|to|for|a))\s*$", re.I)
_MARKUP = re.compile(r"<(?:p|div|span|br|table|td|a)\b[^>]*>|&(?:nbsp|amp|lt|gt|quot);|\ufffd")
_PROOF = re.compile(
    r"\b(?:prove|show|demonstrate|verify|justify|disprove)\b(?: that| the| whether|:| or disprove)"
    r"|\bgive a proof\b|\bprove it\b|\bis a contradiction\b",
    re.IGNORECASE,
)
_PART = re.compile(
    r"(?:^|[\s.;?])(?:\(([a-e]|i{1,3}|iv|v|[1-5])\)|([a-e]|i{1,3})\))\s", re.MULTILINE
)
_NUMBERED = re.compile(r"^\s*(?:part\s+)?([1-5a-eA-E])[.)]\s+\S", re.MULTILINE)
_PARTS = (["a", "b"], ["i", "ii"], ["1", "2"])
_SUBQUESTION = re.compile(
    r"\b(?:find|compute|determine|calculate|what|how|prove|evaluate|show)\b", re.IGNORECASE
)
_TWO_VALUES = {"true", "false", "yes", "no", "correct", "incorrect", "right", "wrong", "t", "f"}
_OPTION = re.compile(
    r"(?:^|\s|\$|~)(?:\\text(?:bf)?\{)?\(?([A-E])[).:]\}?[\s~]*(.+?)"
    r"(?=(?:\s|\$|~)+(?:\\text(?:bf)?\{)?\(?[B-F][).:]|\s*\Z)",
    re.DOTALL,
)
_NEEDS_OPTIONS = re.compile(
    r"\b(?:which|what) (?:one )?of (?:the following|these)\b|\bfollowing (?:statements?|options?|"
    r"choices)\b|\bnone of the above\b|\ball of the above\b|\bclosest to\b|\bmost likely\b",
    re.IGNORECASE,
)


def incomplete(task: Task) -> str | None:
    """Broken or cut samples: no question, no answer, markup, a figure that is not there."""
    prompt = task.prompt.strip()
    if len(prompt) < _MIN_CHARACTERS:
        return "too_short"
    has_rules = task.verifier.startswith(("logic:", "synlogic:"))  # judged by these alone
    if not task.reference.strip() and not has_rules:
        return "no_reference"
    if _MARKUP.search(prompt) or "\ufffd" in task.reference:
        return "markup_or_bad_characters"
    if task.domain == "maths" and _MISSING_FIGURE.search(prompt):
        return "needs_a_figure"
    if prompt.count("$") % 2 and "\\$" not in prompt and not re.search(r"\$\d", prompt):
        return "unbalanced_mathematics"
    if any(prompt.count(a) != prompt.count(b) for a, b in ("{}", (r"\left", r"\right"))):
        return "unbalanced_mathematics"
    return "cut_off" if _CUT.search(prompt) else None


def multi_part(task: Task) -> str | None:
    """Several questions in one: labelled parts that each ask something."""
    found = [a or b for a, b in _PART.findall(task.prompt)] or _NUMBERED.findall(task.prompt)
    labels = [label.lower() for label in found]
    if any(labels[: len(start)] == start for start in _PARTS):
        pieces = re.split(r"(?:^|[\s.;?])\(?(?:[a-eA-E]|i{1,3}|iv|v|[1-5])[.)]\s", task.prompt)[1:]
        if sum(bool(_SUBQUESTION.search(piece)) for piece in pieces) >= 2:
            return "labelled_parts"
    return None


def proof(task: Task) -> str | None:
    """A proof is asked for, which no final answer can show."""
    return "asks_for_a_proof" if _PROOF.search(task.prompt) else None


def binary(task: Task) -> str | None:
    """True or false, yes or no: guessing wins half of them."""
    if task.reference.strip().strip(".").lower() in _TWO_VALUES:
        return "two_valued_answer"
    return "asks_yes_or_no" if re.search(r"\btrue or false\b", task.prompt, re.I) else None


def unparseable(task: Task) -> str | None:
    """A maths reference that the verifier could not recognise in another writing."""
    if task.verifier != "maths":
        return None
    answer = reference_answer(task.reference)
    if len(answer) > MAX_ANSWER_CHARACTERS // 10:
        return "long_reference"
    words = re.findall(r"[A-Za-z]{3,}", re.sub(r"\\[A-Za-z]+", " ", answer))
    if len(words) > 3:
        return "reference_in_words"
    # A wrapped copy is equal only when the reference is read, not only compared as text.
    found = compare(answer, rf"\left({answer}\right)" if "," not in answer else answer)
    return None if found.is_equal else "unreadable_reference"


def multiple_choice(task: Task) -> str | None:
    """Options in the prompt."""
    return "has_options" if len(options(task.prompt)) >= 3 else None


FILTERS: dict[str, Callable[[Task], str | None]] = {
    "incomplete": incomplete, "multi_part": multi_part, "proof": proof, "binary": binary,
    "unparseable": unparseable, "multiple_choice": multiple_choice,
}  # fmt: skip


def options(prompt: str) -> dict[str, str]:
    """Letters and texts of the options at a prompt's end, in order from A; empty without."""
    found = _OPTION.findall(prompt)
    letters = [letter for letter, _ in found]
    if len(found) < 3 or letters != list("ABCDE"[: len(letters)]):
        return {}
    return {letter: text.strip(" \n$~\\,;").rstrip() for letter, text in found}


def opened(task: Task) -> Task | None:
    """A multiple-choice task as an open one; None where the question needs its options.

    The options are cut off the prompt, and the reference becomes the text of the right option.
    """
    given = options(task.prompt)
    letter = re.fullmatch(r"\s*(?:\\text(?:bf)?\{)?\(?([A-E])\)?\}?[.)]?\s*", task.reference)
    if letter is None or letter[1] not in given or _NEEDS_OPTIONS.search(task.prompt):
        return None
    first = _OPTION.search(task.prompt)
    assert first
    stem = re.sub(r"(?:\s|\$|~|\\qquad|\\quad)+$", "", task.prompt[: first.start()]).strip()
    text = given[letter[1]]
    if not stem or not text:
        return None
    metadata = {**task.metadata, "options": given, "letter": letter[1]}
    return Task(**{**task.__dict__, "prompt": stem, "reference": text, "metadata": metadata})
