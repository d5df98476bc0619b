"""The same problem twice: exactly, by n-grams, by meaning; within a set and against others."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from m1.data.dedup import shingles
from m1.types import Task

Vectors = NDArray[np.float32]
_BLOCK = 2048


def plain(text: str) -> str:
    """Lower-case words and numbers only: what stays of a prompt when its typesetting goes."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"\\(?:left|right|displaystyle|text|mathrm|[,;!: ])", " ", text)
    return " ".join(re.findall(r"[a-z]+|[0-9]+|[^\sa-z0-9$\\{}.,;:?!'\"()\[\]]", text))


def numbers(text: str) -> Counter[str]:
    """The numbers in a text, as often as they stand there, without leading zeros."""
    return Counter(n.lstrip("0") or "0" for n in re.findall(r"[0-9]+", text))


def same_numbers(first: str, second: str) -> bool:
    """Whether two texts hold the same numbers.

    Problems of one template read alike and differ in their numbers, and so in their answers;
    neither n-grams nor sentence vectors see that.
    """
    return numbers(first) == numbers(second)


def numbers_within(first: str, second: str) -> bool:
    """Whether all numbers of the text with fewer of them stand in the other."""
    a, b = sorted((numbers(first), numbers(second)), key=lambda count: count.total())
    return not a - b


def exact_duplicates(tasks: Sequence[Task]) -> dict[int, int]:
    """Index of every later copy to the index of the first, by plain text."""
    first: dict[str, int] = {}
    found = {}
    for index, task in enumerate(tasks):
        key = plain(task.prompt)
        if first.setdefault(key, index) != index:
            found[index] = first[key]
    return found


def near_duplicates(tasks: Sequence[Task], *, num_words: int, threshold: float) -> dict[int, int]:
    """Later tasks whose shingles reach a Jaccard similarity with an earlier one that stays.

    Exact, through an inverted index: candidates share at least one shingle. Tasks with different
    numbers are different tasks.
    """
    index: dict[int, list[int]] = defaultdict(list)
    sets: dict[int, NDArray[np.uint32]] = {}
    found: dict[int, int] = {}
    for number, task in enumerate(tasks):
        own = shingles(plain(task.prompt), num_words)
        common: dict[int, int] = defaultdict(int)
        for shingle in own.tolist():
            for other in index[shingle]:
                common[other] += 1
        for other, shared in sorted(common.items()):
            is_near = shared / (len(own) + len(sets[other]) - shared) >= threshold
            if is_near and same_numbers(task.prompt, tasks[other].prompt):
                found[number] = other
                break
        else:
            sets[number] = own
            for shingle in own.tolist():
                index[shingle].append(number)
    return found


def contaminated(
    tasks: Sequence[Task], others: Sequence[Task], *, num_words: int, share: float
) -> dict[int, int]:
    """Tasks that hold, or are held in, another text by this share of the shorter one's n-grams."""
    index: dict[int, list[int]] = defaultdict(list)
    sizes = []
    for number, other in enumerate(others):
        own = shingles(plain(other.prompt), num_words)
        sizes.append(len(own))
        for shingle in own.tolist():
            index[shingle].append(number)
    found = {}
    for number, task in enumerate(tasks):
        own = shingles(plain(task.prompt), num_words)
        common: dict[int, int] = defaultdict(int)
        for shingle in own.tolist():
            for other_number in index.get(shingle, ()):
                common[other_number] += 1
        for other_number, shared in sorted(common.items()):
            is_near = shared >= share * min(len(own), sizes[other_number])
            if is_near and numbers_within(task.prompt, others[other_number].prompt):
                found[number] = other_number
                break
    return found


def similar_within(
    vectors: Vectors, threshold: float, *, agree: Callable[[int, int], bool]
) -> dict[int, int]:
    """Later rows whose cosine similarity with an earlier row that stays reaches the threshold.

    Args:
        vectors: float32 [N, D], rows of length 1.
        threshold: Cosine similarity.
        agree: Whether two rows may be the same for all that vectors do not see.
    """
    found: dict[int, int] = {}
    for start in range(0, len(vectors), _BLOCK):
        block = vectors[start : start + _BLOCK]
        near = block @ vectors[: start + len(block)].T >= threshold
        for row in range(len(block)):
            number = start + row
            others = (int(other) for other in np.flatnonzero(near[row, :number]))
            match = next((o for o in others if o not in found and agree(number, o)), None)
            if match is not None:
                found[number] = match
    return found


def similar_to(
    vectors: Vectors, others: Vectors, threshold: float, *, agree: Callable[[int, int], bool]
) -> dict[int, int]:
    """Rows whose cosine similarity with any other row reaches the threshold, and which."""
    found: dict[int, int] = {}
    for start in range(0, len(vectors) if len(others) else 0, _BLOCK):
        near = vectors[start : start + _BLOCK] @ others.T >= threshold
        for row in range(len(near)):
            candidates = (int(other) for other in np.flatnonzero(near[row]))
            match = next((o for o in candidates if agree(start + row, o)), None)
            if match is not None:
                found[start + row] = match
    return found
