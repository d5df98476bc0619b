"""Attempts to leave a sandbox: what is tried, by what it is stopped, and how that looks.

Each is Python that must raise; `look` matches the error's type and errno. Names in capitals are
targets that the test sets up outside: SECRET, a file all may read; PID, a process; PORT, a listener
on HOST; SOCKET, an abstract socket; OTHER, a file of another sandbox; SHM, a file in /dev/shm.
"""

from dataclasses import dataclass

BUBBLEWRAP, POD = "bubblewrap", "pod"


@dataclass(frozen=True)
class Attempt:
    """One line of the suite; texts are for both kinds where there is one."""

    name: str
    code: str
    by: str | dict[str, str]
    look: str | dict[str, str]

    def of(self, kind):
        """What stops it in this kind of sandbox, and how that looks."""
        by, look = self.by, self.look
        return (
            by if isinstance(by, str) else by[kind],
            look if isinstance(look, str) else look[kind],
        )


DENIED = r"PermissionError:(EPERM|EACCES)|OSError:(EROFS|ENOSYS)"
ABSENT = r"FileNotFoundError|NotADirectoryError|PermissionError:EACCES"
NO_ROUTE = r"OSError:(ENETUNREACH|EHOSTUNREACH)|TimeoutError|ConnectionRefusedError|PermissionError"
ROOT = "own root filesystem: the host's is not mounted"
PIDS = "own process namespace"
NETWORK = {
    BUBBLEWRAP: "own network namespace without any device",
    POD: "network policy, here the cluster's own isolation: no route out of the pod",
}
IPC = "own IPC and mount namespaces"
USER = "an unprivileged user without capabilities, no_new_privs"
SECCOMP = {
    BUBBLEWRAP: "seccomp filter, no capabilities",
    POD: "RuntimeDefault seccomp profile, no capabilities",
}


def call(number, *arguments):
    return f"syscall({', '.join(map(str, (number, *arguments)))})"


# fmt: off
ATTEMPTS = [
    Attempt("read a file of the host", "open(SECRET).read()", ROOT, ABSENT),
    Attempt("read password hashes", "open('/etc/shadow').read()", ROOT, ABSENT),
    Attempt("list root's home", "os.listdir('/root')", ROOT, ABSENT),
    Attempt(
        "reach the host's root through process 1",
        "open('/proc/1/root' + SECRET).read()",
        PIDS,
        ABSENT,
    ),
    Attempt("climb out by ..", "open('/work/' + '../' * 40 + SECRET).read()", ROOT, ABSENT),
    Attempt(
        "read the host's mounts through /proc/1/mountinfo",
        "assert SECRET.rsplit('/', 1)[0] in open('/proc/1/mountinfo').read()",
        PIDS,
        "AssertionError",
    ),
    Attempt(
        "read another process's environment", "open(f'/proc/{PID}/environ').read()", PIDS, ABSENT
    ),
    Attempt("signal a process of the host", "os.kill(PID, 9)", PIDS, "ProcessLookupError"),
    Attempt(
        "trace a process of the host",
        call(101, 16, "PID", 0, 0),
        {BUBBLEWRAP: "seccomp filter, own process namespace", POD: PIDS},
        {BUBBLEWRAP: DENIED, POD: f"ProcessLookupError|{DENIED}"},
    ),
    Attempt(
        "read another process's memory",
        call(310, "PID", 0, 0, 0, 0, 0),
        {BUBBLEWRAP: "seccomp filter, own process namespace", POD: PIDS},
        {BUBBLEWRAP: DENIED, POD: f"ProcessLookupError|{DENIED}"},
    ),
    Attempt(
        "see processes of another sandbox",
        "assert any(b'12345678' in open(f'/proc/{p}/cmdline', 'rb').read() "
        "for p in os.listdir('/proc') if p.isdigit() and int(p) != os.getpid())",
        PIDS,
        "AssertionError",
    ),
    Attempt("read a file of another sandbox", "open(OTHER).read()", ROOT, ABSENT),
    Attempt("connect to the host", "socket.create_connection((HOST, PORT), 2)", NETWORK, NO_ROUTE),
    Attempt(
        "connect to the loopback of the host",
        "socket.create_connection(('127.0.0.1', PORT), 2)",
        NETWORK,
        NO_ROUTE,
    ),
    Attempt(
        "connect to the internet", "socket.create_connection(('1.1.1.1', 53), 2)", NETWORK, NO_ROUTE
    ),
    Attempt(
        "send a datagram out",
        "s = socket.socket(type=socket.SOCK_DGRAM); "
        "s.sendto(b'x', ('1.1.1.1', 53)); s.settimeout(2); s.recv(1)",
        NETWORK,
        NO_ROUTE,
    ),
    Attempt("look up a name", "socket.getaddrinfo('example.com', 80)", NETWORK, "gaierror"),
    Attempt(
        "ask the cloud's metadata service",
        "socket.create_connection(('169.254.169.254', 80), 2)",
        NETWORK,
        NO_ROUTE,
    ),
    Attempt(
        "call the cluster's API",
        "socket.create_connection(('10.96.0.1', 443), 2)",
        NETWORK,
        NO_ROUTE,
    ),
    Attempt(
        "connect to an abstract socket",
        "socket.socket(socket.AF_UNIX).connect(SOCKET)",
        NETWORK,
        "ConnectionRefusedError",
    ),
    Attempt(
        "talk to the hypervisor",
        "s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM); s.settimeout(2); "
        "s.connect((2, 1024))",
        {
            BUBBLEWRAP: "seccomp filter on socket families, as vsock knows no namespaces",
            POD: "RuntimeDefault seccomp profile, or no listener",
        },
        {BUBBLEWRAP: DENIED, POD: f"{DENIED}|OSError|ConnectionResetError|TimeoutError"},
    ),
    Attempt("open a raw socket", "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)", USER, DENIED),
    Attempt("read shared memory of the host", "open(SHM).read()", IPC, ABSENT),
    Attempt("become root", "os.setuid(0)", USER, f"{DENIED}|OSError:EINVAL"),
    Attempt(
        "gain rights by a setuid program",
        "os.chmod(__import__('shutil').copy('/usr/bin/id', '/tmp/id'), 0o6755); "
        "import subprocess; out = subprocess.run(['/tmp/id'], capture_output=True, text=True); "
        "assert 'uid=0' in out.stdout or 'euid=0' in out.stdout; "
        "assert 'NoNewPrivs:\\t0' in open('/proc/self/status').read()",
        USER,
        "AssertionError|PermissionError",
    ),
    Attempt(
        "have capabilities",
        "assert 'CapBnd:\\t0000000000000000' not in open('/proc/self/status').read()",
        USER,
        "AssertionError",
    ),
    Attempt(
        "make a device node", "os.mknod('/tmp/disk', 0o60666, os.makedev(254, 0))", USER, DENIED
    ),
    Attempt(
        "open the disk",
        "[open(f'/dev/{d}', 'rb') for d in ('vda', 'sda', 'nvme0n1')]",
        "own /dev",
        ABSENT,
    ),
    Attempt(
        "read the kernel's log and memory",
        "[open(d, 'rb').read(1) for d in ('/dev/kmsg', '/dev/mem')]",
        "own /dev",
        ABSENT,
    ),
    Attempt(
        "mount a filesystem", call(165, 'b"none"', 'b"/tmp"', 'b"tmpfs"', 0, 0), SECCOMP, DENIED
    ),
    Attempt(
        "mount a control group with a release agent",
        call(165, 'b"none"', 'b"/tmp"', 'b"cgroup"', 0, 'b"memory"'),
        SECCOMP,
        DENIED,
    ),
    Attempt("new user namespace by unshare", call(272, 0x10000000), SECCOMP, DENIED),
    Attempt(
        "new user namespace by clone",
        "pid = " + call(56, "0x10000000 | 17", 0, 0, 0, 0) + "\nif pid == 0: os._exit(0)",
        {BUBBLEWRAP: "user namespaces are disabled inside", POD: SECCOMP[POD]},
        {BUBBLEWRAP: f"OSError:ENOSPC|{DENIED}", POD: DENIED},
    ),
    Attempt(
        "new user namespace by clone3",
        "import struct; args = ctypes.create_string_buffer(struct.pack('=11Q', 0x10000000, "
        "0, 0, 0, 17, 0, 0, 0, 0, 0, 0))\npid = syscall(435, args, 88)\n"
        "if pid == 0: os._exit(0)",
        {BUBBLEWRAP: "user namespaces are disabled inside", POD: SECCOMP[POD]},
        {BUBBLEWRAP: f"OSError:ENOSPC|{DENIED}", POD: DENIED},
    ),
    Attempt(
        "enter the namespaces of process 1",
        "fd = os.open('/proc/1/ns/mnt', 0); " + call(308, "fd", 0),
        SECCOMP,
        DENIED,
    ),
    Attempt("change the root", "os.chroot('/tmp')", SECCOMP, DENIED),
    Attempt("pivot the root", call(155, 'b"/tmp"', 'b"/tmp"'), SECCOMP, DENIED),
    Attempt(
        "leave the control group",
        "[open(os.path.join(d, 'cgroup.procs'), 'w').write('0') for d in "
        "('/sys/fs/cgroup', '/sys/fs/cgroup/memory', '/sys/fs/cgroup/pids')]",
        {BUBBLEWRAP: "no /sys", POD: "control groups are mounted read-only"},
        f"{ABSENT}|{DENIED}",
    ),
    Attempt(
        "set the core pattern",
        "open('/proc/sys/kernel/core_pattern', 'w').write('|/tmp/x')",
        USER,
        f"{DENIED}|{ABSENT}",
    ),
    Attempt(
        "press magic keys",
        "open('/proc/sysrq-trigger', 'w').write('b')",
        USER,
        f"{DENIED}|{ABSENT}",
    ),
    Attempt("load a kernel module", call(175, 0, 0, 'b""'), SECCOMP, DENIED),
    Attempt("load a BPF program", call(321, 5, 0, 0), SECCOMP, DENIED),
    Attempt(
        "use io_uring",
        call(425, 4, "ctypes.create_string_buffer(256)"),
        {BUBBLEWRAP: SECCOMP[BUBBLEWRAP], POD: "RuntimeDefault of newer runtimes only"},
        {BUBBLEWRAP: DENIED, POD: f"{DENIED}|RETURNED"},
    ),
    Attempt("read the kernel's keys", call(250, 0, -3, 0), SECCOMP, DENIED),
    Attempt("watch the processor", call(298, 'b"\\0" * 128', 0, -1, -1, 0), SECCOMP, DENIED),
    Attempt("open a file by handle", call(304, -1, 'b"\\0" * 64', 0), SECCOMP, DENIED),
    Attempt("reboot", call(169, "0xfee1dead", "0x28121969", "0x1234567", 0), SECCOMP, DENIED),
    Attempt("set the clock", "time.clock_settime(time.CLOCK_REALTIME, 0)", USER, DENIED),
    Attempt("set the host's name", "socket.sethostname('x')", USER, DENIED),
    Attempt(
        "take real-time priority",
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))",
        USER,
        DENIED,
    ),
    Attempt(
        "raise its own limits",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))",
        USER,
        f"{DENIED}|ValueError",
    ),
    Attempt(
        "change the system's programs",
        "open('/usr/bin/python3', 'ab')",
        "/usr is read-only",
        f"{DENIED}|OSError:ETXTBSY",
    ),
    Attempt(
        "add to the system's folders", "open('/usr/lib/evil.py', 'w')", "/usr is read-only", DENIED
    ),
    Attempt(
        "link to a file of the system",
        "os.link('/usr/bin/id', '/work/id')",
        "another filesystem, read-only",
        f"OSError:EXDEV|{DENIED}",
    ),
    Attempt(
        "read the service account's token",
        "open('/var/run/secrets/kubernetes.io/serviceaccount/token').read()",
        "none is mounted",
        ABSENT,
    ),
    Attempt(
        "type into the terminal",
        "import fcntl; fcntl.ioctl(0, 0x5412, b'x')",
        "a session of its own without terminal",
        r"OSError|PermissionError",
    ),
    Attempt(
        "use descriptors of the outside",
        "assert [f for f in os.listdir('/proc/self/fd') if int(f) > 2 and not "
        "os.path.realpath(f'/proc/self/fd/{f}').startswith('/proc')]",
        "all are closed on exec",
        "AssertionError",
    ),
    Attempt(
        "make a huge file",
        "open('/tmp/huge', 'w').truncate(1 << 40)",
        "RLIMIT_FSIZE",
        "OSError:EFBIG",
    ),
]
# fmt: on

DRIVER = """
import ctypes, errno, json, os, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def syscall(*arguments):
    ctypes.set_errno(0)
    found = libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    if found < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return found
attempts, targets = json.load(sys.stdin)
for code in attempts:
    try:
        exec(code, {**globals(), **targets})
    except BaseException as error:
        number = getattr(error, "errno", None)
        seen = f"{type(error).__name__}:{errno.errorcode.get(number, number)}"
    else:
        seen = "RETURNED"
    print(json.dumps(seen), flush=True)
"""
