"""A small project of our own in two releases, for machines that reach no package index.

`ranges` reads and writes lists of whole numbers such as `1-3,7`. Release 0.1.1 mends two faults.
"""

from m1.swe.releases import Release, Sdist

_MODULE = '''"""Lists of whole numbers as text: `1-3,7` is 1, 2, 3 and 7."""


def parse(text):
    """Numbers of a text, in order and once each."""
    numbers = set()
    for part in text.split(","):
        part = part.strip()
        if not part:
            continue
        first, dash, last = part.partition("-")
        if dash:
            numbers.update(range(int(first), int(last){stop}))
        else:
            numbers.add(int(first))
    return sorted(numbers)


def write(numbers):
    """The shortest text of some numbers."""
    parts = []
    ordered = sorted(set(numbers))
    start = 0
    for index in range(1, len(ordered) + 1):
        if index < len(ordered) and ordered[index] == ordered[index - 1] + 1:
            continue
        run = ordered[start:index]
        parts.append(str(run[0]) if len(run) == 1 else f"{{run[0]}}-{{run[-1]}}")
        start = {start}
    return ",".join(parts)


def count(text):
    """How many numbers a text names."""
    return len(parse(text))
'''
_OLD_TESTS = """import pytest

from ranges import count, parse, write


def test_single_numbers():
    assert parse("3, 1,1") == [1, 3]


def test_nothing():
    assert parse("") == []
    assert write([]) == ""


def test_no_number():
    with pytest.raises(ValueError):
        parse("x")


@pytest.mark.parametrize("text,number", [("1", 1), ("5,6", 2), (" 7 ,", 1)])
def test_count(text, number):
    assert count(text) == number
"""
_NEW_TESTS = (
    _OLD_TESTS
    + """

def test_a_range_includes_its_end():
    assert parse("1-3,7") == [1, 2, 3, 7]


class TestWriting:
    def test_runs_are_joined(self):
        assert write([1, 2, 3, 7, 9, 10]) == "1-3,7,9-10"

    def test_what_is_written_reads_back(self):
        for numbers in ([4], [1, 2], [1, 3, 5, 6]):
            assert parse(write(numbers)) == numbers
"""
)
_CHANGES = """Changes
=======

{new}0.1.0
-----

- First release.
"""
_NEW_CHANGES = """0.1.1
-----

- Fixed: a range left out its last number, so `1-3` was read as 1 and 2.
- Fixed: runs of numbers were written with what stood before them.

"""


def release(version: str) -> Release:
    """The project's files in version 0.1.0 or 0.1.1."""
    is_new = version == "0.1.1"
    module = _MODULE.format(stop=" + 1" if is_new else "", start="index" if is_new else "index - 1")
    info = f"Metadata-Version: 2.1\nName: m1-ranges\nVersion: {version}\nLicense: Apache-2.0\n"
    files = {
        "ranges.py": module,
        "tests/test_ranges.py": _NEW_TESTS if is_new else _OLD_TESTS,
        "CHANGES.rst": _CHANGES.format(new=_NEW_CHANGES if is_new else ""),
        "PKG-INFO": info,
    }
    sdist = Sdist("m1-ranges", version, f"m1_ranges-{version}", "")
    return Release(sdist, {name: text.encode() for name, text in files.items()})
