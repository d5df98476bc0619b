import random

import pytest

from m1.config.schema import DedupConfig
from m1.data.dedup import deduplicate, overlap, shingles
from m1.data.sources import Document


def documents_of(texts):
    return [Document("s", str(number), text) for number, text in enumerate(texts)]


def run(texts, **fields):
    return deduplicate(documents_of(texts), DedupConfig(**fields), report=lambda done: None)


def kept_numbers(result):
    return [int(document.identifier) for document in result.documents]


def edited(text, num_edits, seed):
    words = text.split()
    for place in random.Random(seed).sample(range(len(words)), num_edits):
        words[place] = f"edit{place}"
    return " ".join(words)


@pytest.mark.parametrize(
    ("text", "num_words", "count"),
    [("a b c d", 2, 3), ("a b a b", 2, 2), ("a", 5, 1), ("", 5, 0), ("A b\n a  B", 2, 2)],
)
def test_shingles_are_distinct_word_windows(text, num_words, count):
    assert len(shingles(text, num_words)) == count


def test_shingles_depend_on_order_not_on_white_space_or_case():
    assert (shingles("one two three", 2) == shingles("One\n two   three", 2)).all()
    assert not set(shingles("one two", 2)) & set(shingles("two one", 2))


def test_copies_up_to_white_space_are_exact_and_the_first_stays(make_prose):
    first, second = make_prose(1), make_prose(2)
    result = run([first, second, first.replace("\n", "  "), first])
    assert (kept_numbers(result), result.exact, result.near) == ([0, 1], 2, 0)


def test_every_planted_near_duplicate_is_found_and_nothing_else(make_prose):
    originals = [make_prose(seed) for seed in range(40)]
    # Eight edits in 400 words change about 40 of 396 shingles: Jaccard 356 / 436 = 0.82.
    planted = [edited(text, 8, seed) for seed, text in enumerate(originals[:20])]
    result = run(originals + planted)
    assert kept_numbers(result) == list(range(40))
    assert (result.exact, result.near) == (0, 20)


def test_documents_below_the_threshold_stay(make_prose):
    # Half of one text, half another: Jaccard 1/3.
    base = make_prose(1)
    mixed = base[: len(base) // 2] + make_prose(2)[len(base) // 2 :]
    assert kept_numbers(run([base, mixed])) == [0, 1]


def test_the_estimate_agrees_with_the_exact_jaccard_similarity(make_prose):
    base = make_prose(3)
    for num_edits, is_near in ((2, True), (60, False)):
        other = edited(base, num_edits, 0)
        sets = [set(shingles(text, 5).tolist()) for text in (base, other)]
        exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        assert (exact > 0.8) is is_near
        assert bool(run([base, other]).near) is is_near


def test_overlap_is_the_share_of_known_ngrams():
    documents = documents_of(["a b c d e", "x y z", "a b q r s"])
    others = documents_of(["0 a b c 1", "q r s"])
    # Bigrams ab bc cd de, of which ab bc are known; xy yz; ab bq qr rs.
    assert overlap(documents, others, num_words=2) == [0.5, 0.0, 0.75]
    assert overlap(documents, [], num_words=2) == [0.0, 0.0, 0.0]
