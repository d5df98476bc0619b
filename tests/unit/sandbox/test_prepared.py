import os
import threading
from pathlib import Path

import psutil
import pytest

from m1.sandbox import bubblewrap, cgroup, prepared
from m1.sandbox.base import MIB, Limits, SandboxError
from m1.sandbox.box import PYTHON
from m1.sandbox.opening import open_sealed
from m1.sandbox.prepared import PreparedSandbox
from m1.sandbox.sealed import SealedBubblewrap

pytestmark = pytest.mark.skipif(
    prepared.failure() is not None, reason=f"no prepared sandbox here: {prepared.failure()}"
)
COMMAND = [*PYTHON, "/work/p.py", "one", "two"]
LIMITS = Limits(cpu_seconds=2, wall_seconds=10, memory_mib=128, output_bytes=MIB)
PROGRAMS = {
    "echo": "import sys\nprint(sys.stdin.read().upper(), sys.argv)",
    "bytes": "import sys\nsys.stdout.buffer.write(sys.stdin.buffer.read()[::-1])",
    "line by line": "try:\n    while True: print(input())\nexcept EOFError: print('end')",
    "uncaught": "def f():\n    raise ValueError('x')\nf()",
    "syntax": "print(1)\nprint(",
    "null byte": "print(1)\x00",
    "status": "import sys\nsys.exit(7)",
    "large status": "import sys\nsys.exit(256 + 3)",
    "message as status": "import sys\nsys.exit('gone')",
    "no status": "raise SystemExit",
    "hard exit": "import os\nprint(1, flush=True)\nprint(2)\nos._exit(4)",
    "signal": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
    "abort": "import os\nos.abort()",
    "atexit": "import atexit\natexit.register(print, 'last')\nprint('first')",
    "finalizer": "class A:\n    def __del__(self): print('bye')\na = A()\nprint('hi')",
    "cycle": "class A:\n    def __del__(self): print('bye')\na = A()\na.a = a\ndel a\nprint('hi')",
    "unclosed file": "f = open('/tmp/x', 'w')\nf.write('1')\nprint(__name__, __file__)",
    "thread": "import threading, time\ndef f():\n    time.sleep(0.05); print('t')\n"
    "threading.Thread(target=f).start()\nprint('m')",
    "daemon thread": "import threading, time\n"
    "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nprint('m')",
    "child process": "import subprocess\nprint(subprocess.check_output(['echo', 'x']))",
    "pool": "from multiprocessing import Pool\ndef f(x): return x * x\n"
    "if __name__ == '__main__':\n    with Pool(2) as p: print(p.map(f, [1, 2]))",
    "fork": "import os\nif os.fork(): os.wait(); print('p')\nelse: print('c', flush=True)",
    "closed output": "import sys\nsys.stdout.close()",
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nprint(P(1))",
    "pickle": "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))) is A)",
    "coding": "# coding: latin-1\nprint('ok')",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**6)\n"
    "def f(n): return n and f(n - 1) + 1\nprint(f(5000))",
    "shallow recursion": "def f(n): return n and f(n - 1) + 1\nf(2000)",
    "seeded": "import random\nrandom.seed(3)\nprint(random.random())",
    "environment": "import os\nprint(sorted(os.environ.items()), os.getcwd(), os.listdir('.'))",
    "who": "import os\nprint(os.getuid(), os.getgid(), os.getsid(0) == os.getpid())",
    "paths": "import sys\nprint(sys.path, sys.flags, sys.executable, sys.orig_argv)",
    "limits": "import resource as r\nprint([r.getrlimit(n) for n in (r.RLIMIT_CPU, r.RLIMIT_FSIZE,"
    " r.RLIMIT_NOFILE, r.RLIMIT_CORE)])",
    "descriptors": "import os\nprint(os.listdir('/proc/self/fd'))",
}


@pytest.fixture
def sandbox():
    with PreparedSandbox(limits=LIMITS) as opened:
        yield opened
    prepared.close_boxes()


def run(sandbox, source, **options):
    sandbox.write_file("p.py", source.encode())
    return sandbox.exec(COMMAND, **options)


def test_programs_end_as_they_do_in_an_interpreter_of_their_own(sandbox):
    differences = {}
    with SealedBubblewrap(limits=LIMITS) as cold:
        for name, source in PROGRAMS.items():
            given = {"stdin": b"a\nb\n", "environment": {"LEVEL": "1"}}
            ours, wanted = (run(s, source, **given) for s in (sandbox, cold))
            if (ours.exit_code, ours.stdout) != (wanted.exit_code, wanted.stdout):
                differences[name] = (ours, wanted)
            last = [r.stderr.decode().splitlines()[-1:] for r in (ours, wanted)]
            if last[0] != last[1]:
                differences[f"{name}: errors"] = last
    assert not differences


def test_other_commands_are_executed(sandbox):
    result = sandbox.exec(["sh", "-c", "cat; exit 5"], stdin=b"abc")
    assert (result.stdout, result.exit_code) == (b"abc", 5)
    assert sandbox.exec(["/work/absent"]).exit_code == 127
    sandbox.write_file("run", b"#!/bin/sh\necho $LEVEL", is_executable=True)
    assert sandbox.exec(["/work/run"], environment={"LEVEL": "3"}).stdout == b"3\n"


LEAVES_TRACES = """
import ctypes, os, socket, subprocess, sys, builtins
for path in ("/tmp/x", "/dev/shm/x"):
    open(path, "w").write("x")
for path in ("/work/x", "/dev/x", "/usr/x", "/x"):
    try: open(path, "w")
    except OSError: pass
ctypes.CDLL(None).shmget(77, 4096, 0o1666)
subprocess.Popen(["sleep", "1000"], start_new_session=True)
if os.fork() == 0:
    s = socket.socket(socket.AF_UNIX); s.bind("\\0left"); s.listen(1)
    t = socket.socket(); t.bind(("127.0.0.1", 7777)); t.listen(1)
    import time; time.sleep(1000)
builtins.left = sys.left = json_left = 1
import json; json.dumps = None
print(os.getpid())
"""
LOOKS_FOR_TRACES = """
import builtins, ctypes, glob, json, os, socket, sys
print(os.listdir("/tmp"), os.listdir("/dev/shm"), os.listdir("/work"), glob.glob("/*x"))
print([p for p in os.listdir("/proc") if p.isdigit() and int(p) not in (1, os.getpid())])
print(ctypes.CDLL(None).shmget(77, 4096, 0), hasattr(builtins, "left"), hasattr(sys, "left"))
print(json.dumps(1))
for kind, address in ((socket.AF_UNIX, "\\0left"), (socket.AF_INET, ("127.0.0.1", 7777))):
    try: socket.socket(kind).connect(address); print("connected")
    except OSError: pass
"""


def test_nothing_passes_from_one_program_to_the_next_in_the_same_box(sandbox):
    first = run(sandbox, LEAVES_TRACES)
    box = next(iter(prepared._own.boxes.values()))
    second = run(sandbox, LOOKS_FOR_TRACES)
    assert first.exit_code == 0, first
    assert second.stdout == b"[] [] ['p.py'] []\n[]\n-1 False False\n1\n", second
    assert next(iter(prepared._own.boxes.values())) is box
    assert box.num_commands == 2


RIGHTS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
status = dict(l.split(":\\t", 1) for l in open("/proc/self/status").read().splitlines())
print([int(status[k], 16) for k in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
      status["NoNewPrivs"], status["Seccomp"])
NEW_USER, SIGCHLD = 0x10000000, 17
child = libc.syscall(56 if os.uname().machine == "x86_64" else 220, NEW_USER | SIGCHLD, 0, 0, 0, 0)
if child == 0: os._exit(0)
print(child, libc.unshare(NEW_USER), libc.mount(b"none", b"/tmp", b"tmpfs", 0, b""))
for path in ("/proc/1/mem", "/proc/1/environ", "/proc/sys/user/max_user_namespaces"):
    try: open(path, "r+b"); print("opened", path)
    except OSError: pass
"""


def test_a_program_has_no_rights_and_no_way_to_new_ones(sandbox):
    found = run(sandbox, RIGHTS)
    assert found.stdout == b"[0, 0, 0, 0, 0] 1 2\n-1 -1 -1\n", found


@pytest.mark.parametrize(
    ("source", "limit"),
    [
        ("import time\ntime.sleep(60)", "wall"),
        ("while True: pass", "cpu"),
        ("import sys\nwhile True: sys.stdout.write('x' * 65536)", "output"),
        ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "wall"),
        pytest.param(
            "x = bytearray(500 << 20)",
            "memory",
            marks=pytest.mark.skipif(not cgroup.version(), reason="no control group"),
        ),
    ],
)
def test_the_limit_is_named_and_the_next_program_runs(sandbox, source, limit):
    wall = 3 if limit == "wall" else 60  # busy neighbours make the other limits late
    limits = Limits(cpu_seconds=0.5, wall_seconds=wall, memory_mib=128, output_bytes=MIB)
    assert run(sandbox, source, limits=limits).stopped_by == limit
    assert run(sandbox, "print(1)", limits=limits).stdout == b"1\n"


def test_what_a_program_prints_cannot_pass_for_a_failure_of_ours(sandbox):
    source = "import sys\nsys.stderr.write('bwrap: x\\nm1-zygote: x')\nsys.exit({})"
    assert [run(sandbox, source.format(n)).exit_code for n in (1, 255)] == [1, 255]


def test_a_dead_box_is_replaced(sandbox):
    run(sandbox, "print(1)")
    box = next(iter(prepared._own.boxes.values()))
    box._running.process.kill()
    box._running.process.wait()
    assert run(sandbox, "print(1)").stdout == b"1\n"


def test_a_forked_process_uses_and_ends_boxes_of_its_own_only(sandbox):
    run(sandbox, "print(1)")
    box = next(iter(prepared._own.boxes.values()))
    child = os.fork()
    if child == 0:
        is_right = run(sandbox, "print(2)").stdout == b"2\n"
        box.close()
        prepared.close_boxes()
        os._exit(0 if is_right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert run(sandbox, "print(3)").stdout == b"3\n"
    assert next(iter(prepared._own.boxes.values())) is box


def test_purposes_do_not_share_a_box(sandbox):
    with PreparedSandbox(limits=LIMITS, purpose="other") as other:
        inside = [run(s, "import os\nprint(os.readlink('/proc/self/ns/net'))").stdout
                  for s in (sandbox, other)]  # fmt: skip
    assert inside[0] != inside[1]


def test_boxes_end_with_their_thread_and_leave_nothing():
    def groups():
        return set(Path("/sys/fs/cgroup").glob(f"*/m1-sandbox-{os.getpid()}[-.]*"))

    def children():
        return {child.pid for child in psutil.Process().children(recursive=True)}

    before = groups(), children(), len(os.listdir("/proc/self/fd"))
    found = []

    def work():
        with PreparedSandbox(limits=LIMITS) as opened:
            found.append(run(opened, "print(1)").stdout)
        found.append(children() > before[1])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [b"1\n", True]
    assert (groups(), children(), len(os.listdir("/proc/self/fd"))) == before


def test_a_closed_sandbox_refuses_and_names_are_plain(sandbox):
    for name in ("../x", "a/b", "", ".."):
        with pytest.raises(ValueError, match="one plain name"):
            sandbox.write_file(name, b"")
    sandbox.close()
    with pytest.raises(SandboxError, match="closed"):
        sandbox.exec(COMMAND)


def test_a_purpose_gets_a_prepared_sandbox_and_none_where_it_fails(monkeypatch):
    assert isinstance(open_sealed(purpose="program"), PreparedSandbox)
    assert isinstance(open_sealed(), SealedBubblewrap)
    monkeypatch.setattr(prepared, "failure", lambda: "no")
    if bubblewrap.failure() is None:
        assert isinstance(open_sealed(purpose="program"), SealedBubblewrap)
