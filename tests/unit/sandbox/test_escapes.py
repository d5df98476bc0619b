"""At least 60 attempts to leave a sandbox, use more than it may, or outlive it."""

import json
import os
import re
import socket
import subprocess
import threading
import time
from dataclasses import replace

import pytest
from escape_attempts import ATTEMPTS, BUBBLEWRAP, DRIVER, POD
from sandbox_limits import LIMITS

from m1.sandbox.base import MIB, SandboxError, printable

PYTHON = ["python3", "-I", "-S", "-c"]
LOOK_FOR = (
    "import os; print([p for p in os.listdir('/proc') if p.isdigit() "
    "and open(f'/proc/{p}/cmdline', 'rb').read().startswith(b'sleep\\0' + b'87654321')])"
)


@pytest.fixture(scope="module")
def kind(backend):
    return BUBBLEWRAP if backend.name == "bubblewrap" else POD


@pytest.fixture(scope="module")
def one(backend):
    """One sandbox for all attempts that leave it as it was."""
    with backend.open(limits=LIMITS) as opened:
        yield opened


@pytest.fixture(scope="module")
def targets(backend, tmp_path_factory):
    """What lies outside and would be reached by a sandbox that leaks."""
    folder = tmp_path_factory.mktemp("outside")
    for path in (folder, *folder.parents):
        if str(path).startswith("/tmp/") and path.stat().st_uid == os.geteuid():
            path.chmod(0o755)  # only the sandbox stands between the file and its reader
    (folder / "secret").write_text("secret")
    (folder / "secret").chmod(0o644)
    shared = f"/dev/shm/m1-test-{os.getpid()}"
    with open(shared, "w") as file:
        file.write("secret")
    os.chmod(shared, 0o644)
    listener = socket.create_server(("0.0.0.0", 0))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0m1-test-{os.getpid()}")
    abstract.listen()
    process = subprocess.Popen(["sleep", "600"])
    other = backend.open(limits=LIMITS)
    other.write_file("/work/other", b"secret")
    sleeper = threading.Thread(target=other.exec, args=(["sleep", "12345678"],), daemon=True)
    sleeper.start()
    yield {
        "SECRET": str(folder / "secret"),
        "PID": process.pid,
        "HOST": _address(),
        "PORT": listener.getsockname()[1],
        "SOCKET": f"\0m1-test-{os.getpid()}",
        "OTHER": f"/tmp/{other.name}/files/written/work/other",
        "SHM": shared,
    }
    process.kill()
    process.wait()
    sleeper.join()
    other.close()
    listener.close()
    abstract.close()
    os.unlink(shared)


def _address():
    with socket.socket(type=socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


@pytest.fixture(scope="module")
def seen(one, targets):
    """The outcome of each attempt, from one process that made them all."""
    codes = json.dumps([[attempt.code for attempt in ATTEMPTS], targets]).encode()
    limits = replace(LIMITS, cpu_seconds=20, wall_seconds=90)
    result = one.exec([*PYTHON, DRIVER], stdin=codes, limits=limits)
    lines = result.stdout.splitlines()
    assert len(lines) == len(ATTEMPTS), result
    return {a.name: json.loads(line) for a, line in zip(ATTEMPTS, lines, strict=True)}


def test_the_targets_can_be_reached_from_outside(targets):
    reachable = {
        "read a file of the host",
        "read shared memory of the host",
        "connect to the host",
        "connect to the loopback of the host",
        "connect to an abstract socket",
    }
    wanted = [a for a in ATTEMPTS if a.name in reachable]
    codes = json.dumps([[a.code for a in wanted], targets]).encode()
    done = subprocess.run(["python3", "-c", DRIVER], input=codes, capture_output=True, check=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == ["RETURNED"] * len(reachable)


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=lambda attempt: attempt.name)
def test_it_is_stopped(seen, kind, attempt, record_property):
    by, look = attempt.of(kind)
    record_property("stopped_by", by)
    assert re.fullmatch(f"({look}).*", seen[attempt.name]), f"{by} did not: {seen[attempt.name]}"


def test_processes_are_bounded(sandbox):
    source = """
import os, time
count = 0
try:
    while count < 1000:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        count += 1
except OSError as error:
    print(count, error.errno, flush=True)
os._exit(0)
"""
    result = sandbox.exec([*PYTHON, source])
    count, number = map(int, result.stdout.split())
    assert 8 < count <= LIMITS.num_processes
    assert number == 11  # EAGAIN
    assert sandbox.exec(["echo", "on"]).stdout == b"on\n"


def test_a_fork_bomb_ends_with_its_time_and_leaves_a_working_sandbox(sandbox):
    source = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    result = sandbox.exec([*PYTHON, source], limits=replace(LIMITS, cpu_seconds=2, wall_seconds=4))
    assert result.stopped_by in ("cpu", "wall")
    assert sandbox.exec(["echo", "on"]).stdout == b"on\n"


def test_memory_is_bounded_over_all_processes(sandbox):
    source = """
import os, time
for _ in range(8):
    if os.fork() == 0:
        x = bytearray(60 << 20)
        for i in range(0, len(x), 4096): x[i] = 1
        time.sleep(2)
        os._exit(0)
ends = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(8)]
print(ends.count(0))
"""
    result = sandbox.exec([*PYTHON, source])
    assert result.stopped_by == "memory"
    assert not result.stdout or int(result.stdout) < 5


def test_files_in_memory_are_bounded(sandbox):
    fill = "head -c 300M /dev/zero > /dev/shm/x"
    result = sandbox.exec(["sh", "-c", fill])
    assert result.exit_code != 0
    is_full = b"No space left" in result.stderr or b"File size limit" in result.stderr
    assert is_full or result.stopped_by in ("memory", "disk")


def test_the_number_of_files_is_bounded(sandbox):
    source = "i = 0\nwhile i < 10**7:\n    open(f'/tmp/{i}', 'w').close()\n    i += 1"
    result = sandbox.exec([*PYTHON, source], limits=replace(LIMITS, cpu_seconds=3, wall_seconds=9))
    is_full = b"No space left" in result.stderr
    assert is_full or result.stopped_by in ("memory", "cpu", "wall", "disk")


def test_a_daemon_does_not_outlive_its_command(one):
    source = """
import os, signal, time
if os.fork() == 0:
    os.setsid()
    for s in range(1, 65):
        try: signal.signal(s, signal.SIG_IGN)
        except (OSError, ValueError): pass
    if os.fork() == 0:
        os.execvp("sleep", ["sleep", "87654321"])
    os._exit(0)
print("started", flush=True)
time.sleep(0.2)
os._exit(0)
"""
    started = time.monotonic()
    assert one.exec([*PYTHON, source]).stdout == b"started\n"
    assert time.monotonic() - started < 10  # though the daemon holds its output
    assert one.exec([*PYTHON, LOOK_FOR]).stdout == b"[]\n"


def test_killing_everything_inside_hurts_nobody_outside(one):
    result = one.exec([*PYTHON, "import os; os.kill(-1, 9)"])
    assert result.stdout == b""
    assert one.exec(["echo", "on"]).stdout == b"on\n"


def test_a_flood_of_output_is_cut(one):
    limits = replace(LIMITS, output_bytes=MIB)
    result = one.exec([*PYTHON, "while True: print('x' * 9999)"], limits=limits)
    assert (result.stopped_by, len(result.stdout)) == ("output", MIB)


def test_error_output_cannot_fill_our_memory(one):
    source = "import sys\nfor _ in range(3000): sys.stderr.write('x' * 9999)"
    assert len(one.exec([*PYTHON, source]).stderr) <= 64 << 10


def test_a_program_cannot_pass_for_a_broken_sandbox(one):
    script = "echo 'bwrap: cannot start' >&2; printf '\\nm1-sandbox-report 0 9 9\\n' >&2; exit 1"
    result = one.exec(["sh", "-c", script])
    assert (result.exit_code, result.stopped_by) == (1, None)


def test_links_do_not_lead_a_reader_out(one, targets):
    one.exec(["ln", "-s", targets["SECRET"], "out"])
    with pytest.raises(SandboxError, match="out"):
        one.read_file("out")


def test_links_do_not_lead_a_writer_out(one, targets, tmp_path):
    target = tmp_path / "canary"
    one.exec(["sh", "-c", f"ln -s {target} in; ln -s {tmp_path} folder"])
    for path in ("in", "folder/canary"):
        with pytest.raises(SandboxError, match=path):
            one.write_file(path, b"x")
    assert not target.exists()


def test_paths_do_not_lead_a_writer_out(one, tmp_path):
    target = tmp_path / "canary"
    path = f"../../../../../..{target}"
    try:
        one.write_file(path, b"x")  # lands in the sandbox's own root, where that can be written
    except SandboxError as error:
        assert "canary" in str(error)
    assert not target.exists()


def test_a_folder_with_links_out_is_copied_as_links(one, tmp_path, targets):
    (tmp_path / "evil").symlink_to(targets["SECRET"])
    one.write_folder("/work/tree", tmp_path)
    assert one.exec(["cat", "/work/tree/evil"]).exit_code == 1


@pytest.mark.parametrize("tool", ["git", "patch"])
def test_a_patch_does_not_write_beside_the_tree(one, tool):
    if one.exec([tool, "--version"]).exit_code:
        pytest.skip(f"{tool} is not in this sandbox")
    patches = [
        f"--- /dev/null\n+++ b/{path}\n@@ -0,0 +1 @@\n+x\n"
        for path in ("../escaped", "/tmp/escaped", ".git/../../escaped")
    ]
    command = {"git": "git apply", "patch": "patch -p1 -i"}[tool]
    lines = ["mkdir -p /work/tree; cd /work/tree"]
    for patch in patches:
        lines += [f"cat > /tmp/p <<'END'\n{patch}END", f"{command} /tmp/p"]
    one.exec(["sh", "-c", "\n".join(lines)])
    assert one.exec(["sh", "-c", "ls /work/escaped /tmp/escaped /escaped"]).stdout == b""


def test_shown_output_is_without_commands_to_the_terminal(one):
    result = one.exec(["printf", r"\033]0;owned\007\033[2Jhello\033[6n\r"])
    assert printable(result.stdout) == "hello"
