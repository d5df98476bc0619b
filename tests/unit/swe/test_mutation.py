import ast

import pytest

from m1.swe import sample
from m1.swe.mutation import choose, mutations

SOURCE = """
TOP = 1 + 2


def f(é, n):
    if é in (1, 2) and not n:
        return é
    while n < 3:
        n = n * 2
    return min(n, 4) if n is not None else None
"""


def test_every_mutation_is_another_program_with_one_change():
    source = SOURCE.encode()
    found = mutations("m.py", source)
    texts = [m.apply(source) for m in found]
    assert len(set(texts)) == len(texts) > 10
    for text in texts:
        ast.parse(text)
        assert text != source and b"TOP = 1 + 2" in text  # code outside functions stays


@pytest.mark.parametrize(
    "operator, text",
    [
        ("comparison", "not in (1, 2)"),
        ("comparison", "while n <= 3"),
        ("comparison", "n is None else"),
        ("connective", "or not n"),
        ("condition", "and n:"),
        ("condition", "while not (n < 3)"),
        ("arithmetic", "n + 2"),
        ("call", "max(n, 4)"),
        ("constant", "min(n, 5)"),
        ("return", "return None\n    while"),
    ],
)
def test_operators_change_what_they_say(operator, text):
    source = SOURCE.encode()
    made = [m.apply(source).decode() for m in mutations("m.py", source) if m.operator == operator]
    assert any(text in other for other in made)


def test_what_is_no_python_has_no_mutations():
    assert mutations("m.py", b"def f(:\n") == []


def test_choices_depend_on_the_seed_alone_and_spare_the_tests():
    release = sample.release("0.1.1")
    assert choose(release, seed=3) == choose(release, seed=3) != choose(release, seed=4)
    assert {m.file for m in choose(release, seed=3)} == {"ranges.py"}
    lines = [m.line for m in choose(release, seed=3)]
    assert len(set(lines)) == len(lines)
