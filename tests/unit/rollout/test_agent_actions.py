import pytest

from m1.rollout.actions import (
    ActionError,
    Command,
    Edit,
    apply_edit,
    parse_action,
    parse_edits,
    shorten,
)

EDIT = "```edit a/b.py\n<<<<<<< SEARCH\nold\n=======\nnew\nlines\n>>>>>>> REPLACE\n```"


def test_one_command_is_read():
    found = parse_action("I look.\n\n```bash\nls -l\ncat x\n```\n")
    assert found == Command("ls -l\ncat x\n") and not found.is_submission
    assert parse_action("```sh\nsubmit\n```").is_submission


def test_one_edit_is_read():
    assert parse_action(f"So:\n{EDIT}") == Edit("a/b.py", "old\n", "new\nlines\n")


def test_what_is_thought_is_no_action():
    found = parse_action("<think>\n```bash\nrm -r .\n```\n</think>\n```bash\nls\n```")
    assert found == Command("ls\n")


@pytest.mark.parametrize(
    "reply, message",
    [
        ("nothing", "0 blocks"),
        ("```bash\nls\n```\n```bash\nls\n```", "2 blocks"),
        ("```python\nx\n```", "0 blocks"),
        ("```edit\n" + EDIT.partition("\n")[2], "must name a file"),
        ("```edit a.py\nold\n```", "SEARCH"),
    ],
)
def test_a_reply_without_exactly_one_action_is_refused(reply, message):
    with pytest.raises(ActionError, match=message):
        parse_action(reply)


def test_several_edits_are_read_in_order():
    assert [e.path for e in parse_edits(f"{EDIT}\nand\n{EDIT.replace('a/b', 'c')}")] == [
        "a/b.py",
        "c.py",
    ]


def test_an_edit_replaces_a_text_that_stands_once():
    edit = Edit("f", "b\n", "B\n")
    assert apply_edit("a\nb\nc\n", edit) == "a\nB\nc\n"
    with pytest.raises(ActionError, match="stands 2 times"):
        apply_edit("b\nb\n", edit)
    with pytest.raises(ActionError, match="stands 0 times"):
        apply_edit("a\n", edit)


def test_an_empty_search_makes_a_new_file_only():
    assert apply_edit("", Edit("f", "", "x\n")) == "x\n"
    with pytest.raises(ActionError, match="exists"):
        apply_edit("a", Edit("f", "", "x\n"))


def test_long_observations_keep_both_ends():
    text = "a" * 600 + "z" * 600
    short = shorten(text, 300)
    assert short.startswith("a" * 200) and short.endswith("z" * 100) and "900 characters" in short
    assert shorten(text, 1200) == text
