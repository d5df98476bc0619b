"""Runs inside a prepared sandbox, as `/usr/bin/python3 -I -S -c <this text> FD`; see `prepared`.

It waits for requests and forks a child for each. A child of pid namespace, mounts, IPC and host
name of its own gives up every right and becomes the program: Python programs run in the child
itself, whose interpreter is warm; others are executed. Standard library only, whatever version
the system's Python has; nothing here may be imported by m1.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import resource
import signal
import socket
import struct
import sys
import threading
import traceback
import types
from typing import Any, NoReturn

HEADER = struct.Struct("!II")
REPLY = struct.Struct("!idI")  # both as in prepared.py
_NEW_MOUNTS, _NEW_UTS, _NEW_IPC, _NEW_PID = 0x20000, 0x4000000, 0x8000000, 0x20000000
_READ_ONLY, _NO_SUID, _NO_DEVICES, _NO_EXECUTION, _REMOUNT = 1, 2, 4, 8, 32
_PRIVATE_BELOW = 0x40000 | 0x4000
_SET_DUMPABLE, _SET_SECCOMP, _DROP_BOUND, _SET_NO_NEW_PRIVILEGES = 4, 22, 24, 38
_AMBIENT, _CLEAR_AMBIENT, _FILTER_MODE = 47, 4, 2
_CAPABILITIES_V3 = 0x20080522
_WARM = (
    "array", "bisect", "collections", "fractions", "functools", "heapq", "io", "itertools", "math",
    "operator", "random", "re", "string", "typing",
)  # fmt: skip
"""What programs often import."""
_libc = ctypes.CDLL(None, use_errno=True)


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def serve(control: socket.socket, seccomp: bytes) -> dict[str, Any] | None:
    """Answer requests until the other side hangs up; returns in the child that is to be Python.

    Returns:
        The request, in a child; None at the end.
    """
    own_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    while True:
        received = _receive(control)
        if received is None:
            return None
        request, files, descriptors = received
        complaints, complain = os.pipe()
        _call("unshare", _NEW_PID)
        child = os.fork()
        if child == 0:
            control.close()
            os.close(own_namespace)
            os.close(complaints)
            return _become(request, files, descriptors, seccomp, complain)
        for descriptor in (*descriptors, complain):
            os.close(descriptor)
        _call("setns", own_namespace, _NEW_PID)
        del request, files, received
        # The child is the init of its namespace: when it is gone, so is all that it started.
        _, status, used = os.wait4(child, 0)
        failure = os.read(complaints, 4096)
        os.close(complaints)
        seconds = used.ru_utime + used.ru_stime
        control.sendall(REPLY.pack(_code(status), seconds, len(failure)) + failure)


def _receive(control: socket.socket) -> tuple[dict[str, Any], bytes, list[int]] | None:
    data, descriptors, _, _ = socket.recv_fds(control, HEADER.size, 3)
    data += _exactly(control, HEADER.size - len(data)) if data else b""
    if not data:
        return None
    num_request, num_files = HEADER.unpack(data)
    request = json.loads(_exactly(control, num_request))
    return request, _exactly(control, num_files), descriptors


def _exactly(control: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = control.recv(min(1 << 20, size - len(data)))
        if not part:
            os._exit(1)
        data += part
    return bytes(data)


def _become(
    request: dict[str, Any], files: bytes, descriptors: list[int], seccomp: bytes, complain: int
) -> dict[str, Any]:
    """Isolate this process, fork the program off it, and wait for that as an init does."""
    try:
        _isolate(request, files)
        _give_up_rights(seccomp)
    except BaseException:  # must not be taken for the program's end
        os.write(complain, traceback.format_exc().encode()[-4000:])
        os._exit(255)
    os.close(complain)
    os.setsid()
    program = os.fork()
    if program == 0:
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
        for descriptor in descriptors:
            os.close(descriptor)
        return _started(request)
    _libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0)
    os.closerange(0, 64)
    while True:
        pid, status = os.wait()
        if pid == program:
            os._exit(_code(status))


def _started(request: dict[str, Any]) -> dict[str, Any]:
    """The last steps before a program; what is no Python is executed and does not return."""
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["script"] is None:
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)  # subprocess does so too
        command = request["command"]
        try:
            os.execvp(command[0], command)
        except OSError as error:
            os.write(2, f"{command[0]}: {error.strerror}\n".encode())
            os._exit(127)
    return request


def _isolate(request: dict[str, Any], files: bytes) -> None:
    with open("/proc/self/oom_score_adj", "w") as stream:
        stream.write("1000")  # out of memory, the program goes before the process that forks
    _call("unshare", _NEW_MOUNTS | _NEW_UTS | _NEW_IPC)
    _call("mount", None, b"/", None, _PRIVATE_BELOW, None)
    plain = _NO_SUID | _NO_DEVICES
    _mount("tmpfs", "/tmp", plain, f"mode=1777,size={request['scratch_bytes']}")
    _mount("tmpfs", "/dev/shm", plain, "mode=1777,size=1m")
    _mount("proc", "/proc", plain | _NO_EXECUTION, "")
    _mount("tmpfs", "/work", plain, "mode=755")
    position = 0
    for name, size, mode in request["files"]:
        descriptor = os.open("/work/" + name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "wb") as stream:
            stream.write(files[position : position + size])
        position += size
    _mount("tmpfs", "/work", plain | _READ_ONLY | _REMOUNT, "")
    os.chdir("/work")
    for name, soft, hard in request["rlimits"]:
        resource.setrlimit(getattr(resource, name), (soft, hard))


def _give_up_rights(seccomp: bytes) -> None:
    """No capability, none to be had again, and no system call of the filter's list."""
    for capability in range(64):
        if _libc.prctl(_DROP_BOUND, capability, 0, 0, 0) != 0:
            break
    _call("prctl", _AMBIENT, _CLEAR_AMBIENT, 0, 0, 0)
    header = struct.pack("=Ii", _CAPABILITIES_V3, 0)
    _call("capset", header, bytes(24))
    _call("prctl", _SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if seccomp:
        table = _Filter(len(seccomp) // 8, seccomp)
        _call("prctl", _SET_SECCOMP, _FILTER_MODE, ctypes.byref(table), 0, 0)


def _forbid_user_namespaces() -> None:
    with open("/proc/sys/user/max_user_namespaces", "w") as stream:
        stream.write("0")


def _mount(kind: str, target: str, flags: int, options: str) -> None:
    _call("mount", b"none", target.encode(), kind.encode(), flags, options.encode())


def _call(name: str, *arguments: Any) -> None:
    wide = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    if getattr(_libc, name)(*wide) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments[:3]}: {os.strerror(number)}")


def _code(status: int) -> int:
    """As a shell says it."""
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def main_module(path: str) -> dict[str, Any]:
    """A fresh `__main__`, as the interpreter makes it for a script."""
    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=path, __cached__=None, __builtins__=__builtins__)
    sys.modules["__main__"] = module
    return module.__dict__


def exit_code(given: Any) -> int:
    """What the interpreter makes of the argument of SystemExit."""
    if given is None or isinstance(given, int):
        return (given or 0) & 0xFF
    print(given, file=sys.stderr)
    return 1


def end(namespace: dict[str, Any], code: int) -> NoReturn:
    """End as the interpreter does, but for the modules that every program finds imported.

    Taking those down would copy most of the memory that is shared with the zygote: 9 ms.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.modules.pop("__main__", None)
        for name in sorted(namespace, key=lambda name: not name.startswith("_")):
            if name != "__builtins__":
                namespace[name] = None
        gc.collect()
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except Exception:
            code = code or 120
    os._exit(code)


if __name__ == "__main__":
    for _name in _WARM:
        importlib.import_module(_name)
    _control = socket.socket(fileno=int(sys.argv[1]))
    _control.set_inheritable(False)
    _forbid_user_namespaces()
    _hello = _receive(_control)
    if _hello is None:
        sys.exit()
    gc.collect()
    gc.freeze()
    _control.sendall(REPLY.pack(0, 0.0, 0))
    _request = serve(_control, _hello[1])
    if _request is None:
        sys.exit()
    # At the module's level, so that the program's own stack is as deep as it would be alone.
    sys.argv = _request["script"]
    sys.orig_argv = _request["command"]
    _namespace = main_module(sys.argv[0])
    try:
        with open(sys.argv[0], "rb") as _stream:
            _program = compile(_stream.read(), sys.argv[0], "exec", dont_inherit=True)
        exec(_program, _namespace)
        _ending = 0
    except SystemExit as _error:
        _ending = exit_code(_error.code)
    except BaseException as _error:
        _trace = _error.__traceback__
        sys.excepthook(type(_error), _error, _trace and _trace.tb_next)
        _ending = 1
    end(_namespace, _ending)
