"""A small grading job for worker processes: apply a patch, run a test, say whether it passes."""

import time

from m1.sandbox.base import Limits, SandboxError
from m1.sandbox.local import BubblewrapBackend

BASE = b"def add(a, b):\n    return a - b\n"
TEST = b"from calc import add\nassert add(2, 3) == 5\n"
LIMITS = Limits(cpu_seconds=5, wall_seconds=60, memory_mib=128, scratch_mib=8, num_files=500)


def grade(number):
    """Whether `add` works after the patch that even numbers bring; 13 raises."""
    if number == 13:
        raise ValueError("thirteen")
    with BubblewrapBackend().open(limits=LIMITS) as sandbox:
        script = "cat > calc.py; [ $1 = 1 ] || sed -i 's/a - b/a + b/' calc.py; shift; exec $@"
        command = ["sh", "-c", script, "sh", str(number % 2), "python3", "-S", "/tmp/test.py"]
        sandbox.exec(["sh", "-c", "cat > /tmp/test.py"], stdin=TEST)
        result = sandbox.exec(command, stdin=BASE, environment={"PYTHONPATH": "/work"})
        if result.exit_code == 137:
            raise SandboxError("killed from outside")
        return result.exit_code == 0


def hang(_):
    """Longer than anyone waits."""
    time.sleep(600)
