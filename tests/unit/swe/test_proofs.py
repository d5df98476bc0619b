import itertools

import pytest

from m1.swe.proofs import insert

SOURCE = b'''
def test_same_line(): seen.append("body")

def test_ends_with_a_block(n=2):
    """Doc."""
    for i in range(n):
        seen.append(i)
    # the end

def test_leaves_early():
    if True: return
    seen.append("never")

def test_returns_a_value():
    return 1, 2

class TestCase:
    def test_method(self):
        text = """
two lines"""

    class TestInner:
        def test_inner(self):
            pass

def test_fails():
    assert not seen

def test_raises():
    raise ValueError

def helper():
    return 3
'''


@pytest.fixture
def module():
    numbers = itertools.count()
    proven = insert(SOURCE, function="proof", secret=lambda: f"s{next(numbers)}")
    given: list[str] = []
    space: dict = {"seen": ["something"], "proof": given.append}
    exec(compile(proven.source, "t", "exec"), space)
    return proven, space, given


@pytest.mark.parametrize(
    "call",
    ["test_same_line", "test_ends_with_a_block", "test_leaves_early", "test_returns_a_value"],
)
def test_a_function_that_ends_hands_over_its_secret(module, call):
    proven, space, given = module
    space[call]()
    assert given == [proven.secrets[call]]


def test_methods_hand_over_theirs_and_classes_inside_classes_too(module):
    proven, space, given = module
    space["TestCase"]().test_method()
    space["TestCase"].TestInner().test_inner()
    assert given == [
        proven.secrets["TestCase.test_method"],
        proven.secrets["TestCase.TestInner.test_inner"],
    ]


@pytest.mark.parametrize("call", ["test_fails", "test_raises"])
def test_a_function_that_fails_hands_over_nothing(module, call):
    _, space, given = module
    with pytest.raises((AssertionError, ValueError)):
        space[call]()
    assert given == []


def test_returned_values_stay(module):
    _, space, given = module
    assert space["test_returns_a_value"]() == (1, 2)
    assert space["helper"]() == 3
    assert len(given) == 1


def test_line_numbers_change_after_blocks_only(module):
    proven, *_ = module
    before, after = SOURCE.split(b"\n"), proven.source.split(b"\n")
    added = [line for line in after if line.strip().startswith(b'proof("')]
    assert len(after) == len(before) + 1 and len(added) == 1


def test_what_is_no_python_comes_back_unchanged():
    for source in (b"def test_x(:\n", b"\xff\xfe", "x = 'é'".encode("latin-1")):
        assert insert(source, function="p", secret=lambda: "s").source == source


def test_windows_line_ends_and_marks_are_read():
    proven = insert(b"\xef\xbb\xbfdef test_a():\r\n    x = 1\r\n", function="p", secret=lambda: "s")
    given: list[str] = []
    space: dict = {"p": given.append}
    exec(compile(proven.source, "t", "exec"), space)
    space["test_a"]()
    assert given == ["s"]
