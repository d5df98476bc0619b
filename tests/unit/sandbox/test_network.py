"""No packet leaves: listeners that this machine reaches, and no sandbox does."""

import contextlib
import os
import shutil
import subprocess
import sys

import pytest

OUTSIDE, NEAR = "198.51.100.2", "198.51.100.1"  # RFC 5737: addresses for tests
LINK = f"m1t{os.getpid() % 100_000}"
SERVER = """
import socket, sys
sys.stdin.readline()
listener = socket.create_server(("0.0.0.0", 0))
print(listener.getsockname()[1], flush=True)
while True:
    with listener.accept()[0] as connection:
        connection.sendall(b"reached")
"""
CLIENT = """
import errno, socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), 3) as connection:
        print(connection.recv(7).decode())
except OSError as error:
    print(errno.errorcode.get(error.errno, type(error).__name__))
"""
# What stops a packet, and how a program sees it.
NO_ROUTE = {
    "bubblewrap": (
        "its own network namespace, which has no device but a loopback",
        {"ENETUNREACH"},
    ),
    "kubernetes": ("no route out of the pod", {"ENETUNREACH", "EHOSTUNREACH", "TimeoutError"}),
    "agent-sandbox": ("no route out of the pod", {"ENETUNREACH", "EHOSTUNREACH", "TimeoutError"}),
}


@contextlib.contextmanager
def listening(prefix=()):
    """A server and its port."""
    command = [*prefix, sys.executable, "-I", "-S", "-c", SERVER]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def port():
        server.stdin.write("\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    try:
        yield server.pid, port
    finally:
        server.kill()
        server.wait()
        server.stdin.close()
        server.stdout.close()


def reach(address, port):
    """What this machine itself sees."""
    command = [sys.executable, "-I", "-S", "-c", CLIENT, address, str(port)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def address_of_this_machine():
    found = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout
    return next((word for word in found.split() if ":" not in word), "127.0.0.1")


@pytest.fixture(scope="module")
def outside():
    """A listener on another machine, as far as packets can tell: behind a cable of its own."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        pytest.skip("a second network needs root, ip, unshare and nsenter")
    with listening(("unshare", "--net")) as (pid, port):

        def run(*words, inside=False):
            enter = ("nsenter", "--target", str(pid), "--net") if inside else ()
            subprocess.run([*enter, "ip", *words], check=True, capture_output=True)

        peer = f"{LINK}p"
        run("link", "add", LINK, "type", "veth", "peer", "name", peer)
        try:
            run("link", "set", peer, "netns", str(pid))
            run("address", "add", f"{NEAR}/30", "dev", LINK)
            run("link", "set", LINK, "up")
            run("address", "add", f"{OUTSIDE}/30", "dev", peer, inside=True)
            run("link", "set", peer, "up", inside=True)
            run("route", "add", "default", "via", NEAR, inside=True)
            found = port()
            assert reach(OUTSIDE, found) == "reached"
            yield OUTSIDE, found
        finally:
            run("link", "delete", LINK)


@pytest.fixture(scope="module")
def host():
    """A listener on this machine."""
    with listening() as (_, port):
        found = address_of_this_machine(), port()
        assert reach(*found) == "reached"
        yield found


@pytest.mark.parametrize("where", ["host", "outside"])
def test_a_listener_that_this_machine_reaches_is_out_of_reach_inside(where, sandbox, request):
    address, port = request.getfixturevalue(where)
    by, seen = NO_ROUTE[sandbox_kind(request)]
    result = sandbox.exec(["python3", "-I", "-S", "-c", CLIENT, address, str(port)])
    assert result.stdout.decode().strip() in seen, f"not stopped by {by}: {result}"
    assert reach(address, port) == "reached"  # still so: the sandbox was the difference


def sandbox_kind(request):
    return request.getfixturevalue("backend").name


def test_a_local_sandbox_has_no_device_but_its_own_loopback(sandbox, request):
    if sandbox_kind(request) != "bubblewrap":
        pytest.skip("a pod has a link to its node")
    result = sandbox.exec(["cat", "/proc/net/dev", "/proc/net/route", "/proc/net/ipv6_route"])
    devices = [line.partition(":")[0].strip() for line in result.stdout.decode().splitlines()
               if ":" in line]  # fmt: skip
    assert devices == ["lo"]
