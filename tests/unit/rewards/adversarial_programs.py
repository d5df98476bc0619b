# ruff: noqa: E501  (a program a line)
"""Programs that try to earn a reward, or do harm, without solving `a + b`.

Each is written against the sandbox and the way programs are judged. The task has one test, input
`2 3`; some of these print the right answer `5` and then misbehave.
"""

PROGRAMS = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "fork bomb with output": "import os\nprint(5, flush=True)\nwhile True:\n    os.fork()",
    "thread bomb": "import threading, time\nwhile True:\n    "
    "threading.Thread(target=time.sleep, args=(99,)).start()",
    "memory bomb": "x = []\nwhile True:\n    x.append(bytearray(1 << 24))",
    "memory bomb in children": "import os\nfor _ in range(8):\n    if os.fork() == 0:\n        "
    "x = bytearray(200 << 20)\n        for i in range(0, len(x), 4096): x[i] = 1\n        import time; time.sleep(9)\nos.wait()",
    "tmpfs bomb": "f = open('/tmp/x', 'wb')\nwhile True:\n    f.write(b'x' * (1 << 20))",
    "endless output": "while True:\n    print(5)",
    "endless error output": "import sys\nwhile True:\n    sys.stderr.write('x' * 4096)",
    "endless output without newline": "import sys\nwhile True:\n    sys.stdout.write('5' * 65536)",
    "endless loop": "print(5, flush=True)\nwhile True:\n    pass",
    "sleep": "import time\nprint(5, flush=True)\ntime.sleep(1000)",
    "sleep with signals ignored": "import signal, time\nfor s in range(1, 65):\n    try: "
    "signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nprint(5, flush=True)\ntime.sleep(1000)",
    "daemon that holds the output": "import os, time\nprint(6, flush=True)\nif os.fork() == "
    "0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(1000)\n    os._exit(0)\nos._exit(0)",
    "right answer then exit code": "print(5, flush=True)\nraise SystemExit(1)",
    "right answer then crash": "import os\nprint(5, flush=True)\nos.abort()",
    "right answer then segmentation fault": "import ctypes\nprint(5, "
    "flush=True)\nctypes.string_at(0)",
    "kills its parent": "import os\nprint(5, flush=True)\nos.kill(os.getppid(), 9)\nraise "
    "SystemExit(3)",
    "kills everything": "import os\nprint(5, flush=True)\nos.kill(-1, 9)",
    "kills the init of its namespace": "import os\nos.kill(1, 9)\nprint(6)",
    "kills its process group": "import os\nprint(5, flush=True)\nos.killpg(0, 9)",
    "reads the password file": "print(open('/etc/shadow').read())",
    "reads the users": "print(open('/etc/passwd').read())",
    "lists the root home": "import os\nprint(os.listdir('/root'))",
    "looks for the expected output": "import os\nfor d, _, fs in os.walk('/'):\n    for f in "
    "fs:\n        if 'expected' in f or f.endswith('.jsonl'): print(open(os.path.join(d, f)).read())",
    "reads environments of others": "import glob\nfor f in "
    "glob.glob('/proc/[0-9]*/environ'):\n    print(open(f, 'rb').read())",
    "reads memory of its parent": "import os\nprint(open(f'/proc/{os.getppid()}/mem', "
    "'rb').read(99))",
    "writes beside the program": "open('/work/program.py', 'w').write('print(5)')\nprint(5)",
    "writes to the host": "open('/usr/lib/x', 'w').write('x')\nprint(5)",
    "makes a file in the root": "open('/x', 'w').write('x')\nprint(5)",
    "network": "import socket\ns = socket.create_connection(('1.1.1.1', 53), timeout=2)\nprint(5)",
    "local network": "import socket\ns = socket.create_connection(('127.0.0.1', 22), "
    "timeout=2)\nprint(5)",
    "name lookup": "import socket\nprint(socket.gethostbyname('example.com'))\nprint(5)",
    "abstract socket of the host": "import socket\ns = "
    "socket.socket(socket.AF_UNIX)\ns.connect('\\0/tmp/.X11-unix/X0')\nprint(5)",
    "mounts": "import ctypes\nl = ctypes.CDLL(None, use_errno=True)\nassert l.mount(b'none', "
    "b'/tmp', b'tmpfs', 0, b'') == 0\nprint(5)",
    "new namespaces": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0\nprint(5)",
    "traces its parent": "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), "
    "0, 0) == 0\nprint(5)",
    "becomes root": "import os\nos.setuid(0)\nprint(5)",
    "clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)\nprint(5)",
    "raises its limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (999, "
    "999))\nprint(5)",
    "objects equal to everything": "class A(str):\n    def __eq__(self, o): return "
    "True\nprint(A('6'))",
    "output of many candidates": "print(' '.join(map(str, range(100))))",
    "right answer among others": "print('4\\n5\\n6')",
    "terminal codes": "print('6\\x1b[1D5')",
    "injects input into the terminal": "import fcntl\nfcntl.ioctl(0, 0x5412, b'5')\nprint(5)",
    "null bytes": "import sys\nsys.stdout.write('5\\0')",
    "invalid text": "import os\nos.write(1, b'\\xff5')",
    "no output": "pass",
    "echo": "print(input())",
    "syntax error": "print(5",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "huge number": "print(10 ** 10 ** 9)",
    "catastrophic pattern": "import re\nre.match('(a+)+b', 'a' * 64)\nprint(5)",
    "fills the file descriptors": "fs = []\nwhile True: fs.append(open('/dev/null'))",
    "endless write to a pipe": "import os\nr, w = os.pipe()\nwhile True: os.write(w, b'x' * 4096)",
    "executes a shell": "import os\nos.execv('/bin/sh', ['sh', '-c', 'cat /etc/hostname; echo 6'])",
}

FUNCTIONS = {
    "equal to everything": "class A(int):\n    def __eq__(self, o): return True\ndef add(a, "
    "b): return A(6)",
    "patched serialiser": "import json\njson.dumps = lambda v: '5 or anything'\ndef add(a, b): "
    "return 6",
    "exit before the end": "import sys\ndef add(a, b): sys.exit(0)",
    "output instead of a value": "def add(a, b): print(5)",
    "output through every descriptor": "import os\ndef add(a, b):\n    for fd in range(3, "
    "64):\n        try: os.write(fd, b'6')\n        except OSError: pass\n    os._exit(0)",
    "exit handler": "import atexit, os\natexit.register(lambda: os.write(1, b'5'))\ndef add(a, "
    "b): return 6",
    "text instead of a number": "def add(a, b): return '5'",
    "truth instead of a number": "def add(a, b): return True",
    "not serialisable": "def add(a, b): return object()",
    "endless recursion": "def add(a, b): return add(a, b)",
}
