"""A verifier that does what the completion says: what a service must survive."""

import ctypes
import os
import signal
import subprocess
import time

from m1.types import Verdict


def verify(task, completion):
    """Obey; anything unknown is right when it equals the reference."""
    if completion == "hang":
        while True:
            pass
    if completion == "sleep":
        time.sleep(1000)
    if completion == "sleep deaf":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(1000)
    if completion == "crash":
        os.abort()
    if completion == "segfault":
        ctypes.string_at(0)
    if completion == "exit":
        os._exit(0)
    if completion == "raise":
        raise ValueError("the verifier is broken")
    if completion == "memory":
        return Verdict(float(len([bytearray(1 << 24) for _ in range(10_000)])), "memory")
    if completion == "recurse":
        return verify_deeper(task, completion)
    if completion == "leave a child":
        subprocess.Popen(["sleep", "1000"])
        while True:
            pass
    time.sleep(float(task.metadata.get("seconds", 0)))
    return Verdict(float(completion == task.reference), "compared", {"length": len(completion)})


def verify_deeper(task, completion):
    """Never ends."""
    return verify_deeper(task, completion + "x")
