import os
import threading
import time
from dataclasses import replace

import pytest
from sandbox_limits import LIMITS

from m1.sandbox.base import MIB, Environment, SandboxError, printable

PYTHON = ["python3", "-I", "-S", "-c"]


def text(result):
    assert (result.exit_code, result.stopped_by) == (0, None), result
    return result.stdout.decode().strip()


def test_input_output_status_folder_and_environment_pass_through(sandbox):
    script = 'cat; pwd; echo "$LEVEL" >&2; exit 7'
    command = ["sh", "-c", script]
    result = sandbox.exec(command, stdin=b"in\n", environment={"LEVEL": "1"}, folder="/tmp")
    assert (result.exit_code, result.stdout, result.stderr) == (7, b"in\n/tmp\n", b"1\n")
    assert result.stopped_by is None


def test_all_bytes_pass_both_ways(sandbox):
    data = bytes(range(256)) * 4096 + os.urandom(1000)
    sandbox.write_file("data", data)
    assert sandbox.read_file("data") == data
    command = [*PYTHON, "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read(1000))"]
    assert sandbox.exec(command, stdin=data[:1000]).stdout == data[:1000]


def test_only_given_variables_are_seen(sandbox, monkeypatch):
    monkeypatch.setenv("M1_SECRET", "s")
    seen = text(sandbox.exec(["env"], environment={"A": "1"}))
    names = {line.partition("=")[0] for line in seen.splitlines()}
    assert {"A", "PATH", "HOME", "LANG"} <= names
    assert "M1_SECRET" not in names
    assert not any("TOKEN" in name or "PASSWORD" in name for name in names)


def test_files_stay_and_processes_do_not(sandbox):
    sandbox.exec(["sh", "-c", "echo x > /tmp/a; echo y > b; (sleep 1000 &) ; exit 0"])
    assert text(sandbox.exec(["sh", "-c", "cat /tmp/a b"])) == "x\ny"
    count = (
        "import os; print(sum(open(f'/proc/{p}/comm').read() == 'sleep\\n' "
        "and b'1000' in open(f'/proc/{p}/cmdline', 'rb').read() "
        "for p in os.listdir('/proc') if p.isdigit()))"
    )
    assert text(sandbox.exec([*PYTHON, count])) == "0"


def test_sandboxes_do_not_see_each_other(backend, sandbox):
    sandbox.write_file("/tmp/mine", b"1")
    with backend.open(limits=LIMITS) as other:
        assert other.name != sandbox.name
        assert other.exec(["cat", "/tmp/mine"]).exit_code == 1


def test_a_program_that_does_not_exist_has_status_127(sandbox):
    assert sandbox.exec(["no-such-program"]).exit_code == 127


def test_output_is_seen_while_it_comes(sandbox):
    seen = []
    command = ["sh", "-c", "echo one; echo two >&2; sleep 2; echo three"]
    sandbox.exec(command, on_output=lambda name, data: seen.append((name, data, time.monotonic())))
    stamps = {data: (name, at) for name, data, at in seen}
    assert {data: name for data, (name, _) in stamps.items()} == {
        b"one\n": "stdout", b"two\n": "stderr", b"three\n": "stdout",
    }  # fmt: skip
    assert stamps[b"three\n"][1] - stamps[b"one\n"][1] > 1


@pytest.mark.parametrize(
    ("source", "limit"),
    [
        ("import time; time.sleep(60)", "wall"),
        ("while True: pass", "cpu"),
        ("import sys\nwhile True: sys.stdout.write('x' * 65536)", "output"),
        ("x = bytearray(400 << 20)", "memory"),
    ],
)
def test_the_limit_that_ends_a_program_is_named_and_the_sandbox_goes_on(sandbox, source, limit):
    wall = 3 if limit == "wall" else 15
    limits = replace(LIMITS, cpu_seconds=1, wall_seconds=wall, output_bytes=MIB)
    result = sandbox.exec([*PYTHON, source], limits=limits)
    assert result.stopped_by == limit
    assert result.exit_code != 0
    assert len(result.stdout) <= MIB
    assert text(sandbox.exec(["echo", "on"])) == "on"


def test_writes_are_bounded_over_all_commands(sandbox):
    fill = "head -c 20M /dev/zero > /tmp/$0"
    assert sandbox.exec(["sh", "-c", fill, "a"]).exit_code == 0
    result = sandbox.exec(["sh", "-c", fill, "b"])
    assert result.exit_code != 0 or result.stopped_by == "disk"


def test_files_get_their_folders_and_modes(sandbox):
    sandbox.write_file("a/b/run", b"#!/bin/sh\necho ran\n", is_executable=True)
    assert text(sandbox.exec(["/work/a/b/run"])) == "ran"
    sandbox.write_file("/tmp/-x y", b"")
    assert sandbox.read_file("/tmp/-x y") == b""


def test_what_cannot_be_read_is_an_error_with_the_path(sandbox):
    sandbox.exec(["sh", "-c", "mkfifo pipe; ln -s /dev/zero zero; mkdir d; echo 12345 > five"])
    for path in ("missing", "pipe", "zero", "d"):
        with pytest.raises(SandboxError, match=path):
            sandbox.read_file(path)
    with pytest.raises(SandboxError, match="larger than max_bytes"):
        sandbox.read_file("five", max_bytes=3)
    with pytest.raises(SandboxError, match="folder"):
        sandbox.write_file("d", b"x")


def test_a_folder_is_copied_with_modes_and_links(sandbox, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "run").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "in" / "run").chmod(0o755)
    (tmp_path / "link").symlink_to("in/run")
    sandbox.write_folder("/work/tree", tmp_path)
    assert text(sandbox.exec(["/work/tree/link"])) == "ran"


def test_a_layer_is_written_without_changing_it(backend, tmp_path):
    (tmp_path / "f").write_text("lower")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "g").write_text("g")
    environment = Environment(layers={"/work": tmp_path})
    with backend.open(environment, limits=LIMITS) as sandbox:
        script = "cat f && echo upper > f && rm -r gone && mkdir gone && ls gone"
        assert text(sandbox.exec(["sh", "-c", script])) == "lower"
        assert sandbox.read_file("f") == b"upper\n"
    assert (tmp_path / "f").read_text() == "lower"
    assert (tmp_path / "gone" / "g").exists()


def test_a_fork_has_the_files_and_goes_its_own_way(backend, tmp_path):
    (tmp_path / "f").write_text("lower")
    environment = Environment(layers={"/work": tmp_path})
    with backend.open(environment, limits=LIMITS) as sandbox:
        sandbox.exec(["sh", "-c", "echo 1 > /tmp/one; rm f; mkdir -p d; ln -s one d/l"])
        with sandbox.fork() as other:
            script = "cat /tmp/one; ls; readlink d/l; echo 2 > /tmp/two"
            assert text(other.exec(["sh", "-c", script])) == "1\nd\none"
        assert sandbox.exec(["cat", "/tmp/two"]).exit_code == 1


def test_a_closed_sandbox_refuses(backend):
    opened = backend.open(limits=LIMITS)
    opened.close()
    opened.close()
    with pytest.raises(SandboxError, match="closed"):
        opened.exec(["true"])


def test_four_sandboxes_work_at_once(backend):
    def work(number, found):
        with backend.open(limits=LIMITS) as opened:
            opened.write_file("n", str(number).encode())
            found[number] = opened.exec(["cat", "n"]).stdout

    found = {}
    threads = [threading.Thread(target=work, args=(n, found)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: str(n).encode() for n in range(4)}


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"\x1b[31mred\x1b[0m", "red"),
        (b"\x1b]0;title\x07x", "x"),
        (b"\x1b]8;;http://a\x1b\\link\x1b]8;;\x1b\\", "link"),
        (b"\x1bP1$r0m\x1b\\x\x1b[6n", "x"),
        (b"a\rb\x08c\x00d\te\n", "abcd\te\n"),
        ("a\u202eb\x9b2Jc".encode(), "abc"),
        (b"\xff", "\ufffd"),
        (b"\x1b[", ""),
    ],
)
def test_shown_output_cannot_steer_a_terminal(raw, shown):
    assert printable(raw) == shown
