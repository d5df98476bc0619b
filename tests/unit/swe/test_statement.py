import pytest

from m1.swe.diffs import tree_diff
from m1.swe.statement import changelog_entry, observations, without_leaks
from m1.swe.suite import SuiteRun, TestOutcome

MARKDOWN = b"# Changelog\n\n## [1.2.1] - 2024-01-02\n\n- Mend `f(1.0)`.\n\n## [1.2.0]\n\n- Old.\n"
RELEASES = (
    b"Release 1.2.1 (Jan 2)\n----------\n\n* Mend it.\n\nRelease 1.2.0 (Jan 1)\n-------\n* Old.\n"
)
LIST = b"Versions\n\n- 1.2.1 Mend it (thanks @x)\n- 1.2.0 Old\n"


@pytest.mark.parametrize(
    "files",
    [
        {"CHANGELOG.md": MARKDOWN},
        {"docs/changelog.rst": RELEASES},
        {"PKG-INFO": b"Version: 1.2.1\n\n" + LIST},
        {"README.rst": LIST},
    ],
)
def test_the_section_of_the_version_is_found_and_no_other(files):
    found = changelog_entry(files, "1.2.1")
    assert "Mend" in found and "Old" not in found


def test_without_a_section_there_is_nothing():
    assert changelog_entry({"CHANGES": b"1.0\n---\n- x\n"}, "1.2.1") == ""
    assert changelog_entry({}, "1.2.1") == ""


def test_lines_that_hold_a_line_of_the_solution_are_left_out():
    gold = tree_diff({"a.py": b"x = 1\n"}, {"a.py": b"x = compute(2, 3)\n"})
    text = "It is wrong.\n    x  =  compute(2,  3)  # so\nIt stays wrong."
    assert without_leaks(text, gold) == "It is wrong.\nIt stays wrong."


def test_observations_name_the_error_and_not_the_test():
    message = (
        "def test_sum():\n>       assert add(1, 2) == 3\nE       assert 4 == 3\n\nt.py:3: Error"
    )
    run = SuiteRun(
        {
            "t.py::test_sum_of_two[a]": TestOutcome("failed", False, message),
            "t.py::test_ends": TestOutcome("timeout", False),
        },
        True,
        errors=("t2.py: ImportError: no name f\nE   ImportError: no name f",),
    )
    found = observations(["t.py::test_sum_of_two[a]", "t.py::test_ends", "t2.py::test_z"], run)
    assert "sum of two: assert 4 == 3" in found and "add(1, 2)" not in found
    assert "ends: it does not end" in found
    assert "z: ImportError: no name f" in found
