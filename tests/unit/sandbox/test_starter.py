"""Shells that wait in their control group for a command."""

import os
import threading
from pathlib import Path

import pytest

from m1.sandbox import bubblewrap, cgroup, starter
from m1.sandbox.base import Limits
from m1.sandbox.local import BubblewrapBackend
from m1.sandbox.store import UNPRIVILEGED_ID

pytestmark = pytest.mark.skipif(
    bubblewrap.failure() is not None, reason=f"no sandbox here: {bubblewrap.failure()}"
)


@pytest.fixture
def waiting():
    """This thread's shell after a command."""
    with BubblewrapBackend().open() as sandbox:
        assert sandbox.exec(["true"]).exit_code == 0
    found = starter.take()
    yield found
    found.close()


def in_group(found):
    return [int(pid) for pid in Path(found.group.entrances[0]).read_text().split()]


@pytest.mark.skipif(not cgroup.version(), reason="no control group")
def test_after_a_command_the_next_shell_is_in_a_group_without_rights(waiting):
    """A shell that answers has everything behind it."""
    waiting.process.stdin.write(b"echo ready\n")
    waiting.process.stdin.flush()
    assert waiting.process.stdout.readline() == b"ready\n"
    assert in_group(waiting) == [waiting.process.pid]
    lines = Path(f"/proc/{waiting.process.pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines)
    if os.geteuid() == 0:
        assert set(status["Uid"].split()) == {str(UNPRIVILEGED_ID)}
        assert set(status["Gid"].split()) == {str(UNPRIVILEGED_ID)}
    assert status["Groups"].strip() == "" and int(status["CapEff"], 16) == 0


@pytest.mark.skipif(not cgroup.version(), reason="no control group")
def test_a_closed_shell_leaves_no_process_and_no_group(waiting):
    folder = Path(waiting.group.entrances[0]).parent
    assert folder.is_dir()
    waiting.close()
    waiting.close()
    assert waiting.process.returncode is not None and not folder.exists()


def test_a_forked_process_leaves_the_shell_of_its_parent_alone(waiting):
    starter._own.starter = waiting
    child = os.fork()
    if child == 0:
        code = 1
        try:
            other = starter.take()
            code = 0 if other is not waiting and other.is_ready else 2
            other.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert starter.take() is waiting and waiting.is_ready


def test_the_shell_of_a_thread_ends_with_it():
    kept = []

    def work():
        starter.prepare()
        found = starter._own.starter
        kept.extend((found.process, found.group and Path(found.group.entrances[0]).parent))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    process, folder = kept
    assert process.wait(10) is not None and (folder is None or not folder.exists())


def test_a_shell_that_died_is_replaced(waiting):
    waiting.process.kill()
    waiting.process.wait()
    starter._own.starter = waiting
    with BubblewrapBackend().open() as sandbox:
        assert sandbox.exec(["echo", "on"]).stdout == b"on\n"


@pytest.mark.parametrize(
    "word",
    ["", "it's", 'a "b" $c `d` \\e', "two\nlines\n", "a; exit 3 #", "-n", "é\udcff", "x" * 100_000],
)
def test_words_and_input_reach_a_command_unchanged(word):
    program = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read() + b'|' + "
    program += "sys.argv[1].encode('utf-8', 'surrogateescape'))"
    with BubblewrapBackend().open(limits=Limits()) as sandbox:
        result = sandbox.exec(["python3", "-S", "-c", program, word], stdin=b"echo no\n" * 3)
    assert result.stdout == b"echo no\n" * 3 + b"|" + os.fsencode(word)
