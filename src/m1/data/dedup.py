"""Deduplication: exact by digest, near by MinHash LSH; the first of each kind stays."""

import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m1.config.schema import DedupConfig
from m1.data.sources import Document

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Deduplicated:
    """Documents that stay, in order, and how many went for which reason."""

    documents: tuple[Document, ...]
    exact: int
    near: int


def shingles(text: str, num_words: int) -> NDArray[np.uint32]:
    """Sorted distinct 32-bit hashes of every `num_words` consecutive words, or of all if fewer."""
    words = text.lower().split()
    if not words:
        return np.empty(0, np.uint32)
    hashes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))
    width = min(num_words, len(words))
    combined = np.zeros(len(words) - width + 1, np.uint64)
    for offset in range(width):
        combined = combined * _MULTIPLIER + hashes[offset : offset + len(combined)]
    mixed = (combined ^ (combined >> np.uint64(32))) * _MULTIPLIER
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


def deduplicate(
    documents: Sequence[Document], config: DedupConfig, *, report: Callable[[int], None]
) -> Deduplicated:
    """Drop documents whose words equal, or nearly equal, those of an earlier document.

    Exact means equal up to white space. Near means an estimated Jaccard similarity of shingle sets
    of at least `threshold`; LSH only proposes candidates, with few misses, and each is checked.
    """
    # Importing datasketch costs 1.5 s, which readers of shingles alone need not pay.
    from datasketch import MinHash, MinHashLSH

    empty = MinHash(config.num_permutations, seed=1, hashfunc=int)
    index = MinHashLSH(config.threshold, config.num_permutations, weights=(0.1, 0.9))
    signatures: list[Any] = []
    digests: set[bytes] = set()
    kept: list[Document] = []
    exact = near = 0
    for number, document in enumerate(documents):
        report(number)
        digest = hashlib.sha256(" ".join(document.text.split()).encode()).digest()
        if digest in digests:
            exact += 1
            continue
        digests.add(digest)
        signature = empty.copy()
        signature.update_batch(shingles(document.text, config.shingle_words).tolist())
        candidates = index.query(signature)
        if any(signature.jaccard(signatures[item]) >= config.threshold for item in candidates):
            near += 1
            continue
        index.insert(len(kept), signature)
        signatures.append(signature)
        kept.append(document)
    return Deduplicated(tuple(kept), exact, near)


def overlap(
    documents: Sequence[Document], others: Sequence[Document], *, num_words: int
) -> list[float]:
    """For each document, the share of its distinct `num_words`-grams that occur in any other."""
    if not others:
        return [0.0] * len(documents)
    known = np.unique(np.concatenate([shingles(other.text, num_words) for other in others]))
    shares = []
    for document in documents:
        own = shingles(document.text, num_words)
        found = np.isin(own, known, assume_unique=True)
        shares.append(float(found.mean()) if len(own) else 0.0)
    return shares
