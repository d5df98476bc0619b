"""What an agent may do in a turn: one command, or one edit, written as one fenced block."""

import re
from dataclasses import dataclass

_FENCE = re.compile(
    r"^```[ \t]*(bash|sh|edit)[ \t]*([^\n`]*)\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE
)
_EDIT = re.compile(
    r"\A<{5,} *SEARCH *\n(.*?)^={5,} *\n(.*?)^>{5,} *REPLACE *\n?\Z", re.DOTALL | re.MULTILINE
)
SUBMIT = "submit"

INSTRUCTIONS = """\
You mend a fault in the repository at /work/tree. Answer every turn with a short thought and exactly
one block, either a command for bash:

```bash
grep -n "def parse" -r .
```

or an edit that replaces a text which stands exactly once in a file:

```edit path/in/the/tree.py
<<<<<<< SEARCH
old lines
=======
new lines
>>>>>>> REPLACE
```

Commands start in the tree, each in a new shell. There is no network. Hidden tests decide; changes
to tests and settings are undone before they run. When the fault is mended, answer with

```bash
submit
```
"""


@dataclass(frozen=True)
class Command:
    """A command line for bash."""

    text: str

    @property
    def is_submission(self) -> bool:
        """Whether it ends the episode."""
        return self.text.strip() == SUBMIT


@dataclass(frozen=True)
class Edit:
    """A replacement of one text in one file of the tree."""

    path: str
    old: str
    new: str


class ActionError(ValueError):
    """A reply without exactly one action; the message is for the model."""


def parse_action(reply: str) -> Command | Edit:
    """The action of a reply; what stands before `</think>` is no part of it.

    Raises:
        ActionError: There is no block, several, or one that is no edit.
    """
    blocks = _FENCE.findall(reply.rpartition("</think>")[2])
    if len(blocks) != 1:
        raise ActionError(
            f"your answer holds {len(blocks)} blocks of bash or edit, but must hold exactly one"
        )
    kind, path, body = blocks[0]
    if kind != "edit":
        return Command(body)
    return _as_edit(path, body)


def parse_edits(reply: str) -> list[Edit]:
    """All edits of a reply, in order; commands in it are passed over.

    Raises:
        ActionError: There is none, or a block is no edit.
    """
    blocks = _FENCE.findall(reply.rpartition("</think>")[2])
    edits = [_as_edit(path, body) for kind, path, body in blocks if kind == "edit"]
    if not edits:
        raise ActionError("the answer holds no edit")
    return edits


def _as_edit(path: str, body: str) -> Edit:
    found = _EDIT.match(body)
    if not found or not path.strip():
        raise ActionError(
            "the edit must name a file behind ```edit and hold one SEARCH part, one ======= line "
            "and one REPLACE part"
        )
    return Edit(path.strip(), found[1], found[2])


def apply_edit(source: str, edit: Edit) -> str:
    """The file after an edit; an empty SEARCH makes a new file.

    Raises:
        ActionError: The text does not stand in the file exactly once.
    """
    if not edit.old:
        if source:
            raise ActionError(f"SEARCH is empty, but {edit.path} exists; name the lines to replace")
        return edit.new
    count = source.count(edit.old)
    if count != 1:
        raise ActionError(
            f"the SEARCH text stands {count} times in {edit.path}, but must stand exactly once; "
            "copy the lines as they are, with enough of them to be unique"
        )
    return source.replace(edit.old, edit.new)


def shorten(text: str, max_characters: int) -> str:
    """Beginning and end of a long observation, with a note of what is left out between them."""
    if len(text) <= max_characters:
        return text
    head = max_characters * 2 // 3
    tail = max_characters - head
    left_out = len(text) - head - tail
    return f"{text[:head]}\n[... {left_out} characters left out ...]\n{text[-tail:]}"
