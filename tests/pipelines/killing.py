"""Kills stages of the miniature recipe, in a process of their own that imports once."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def kill_stages(root: Path, stages: list[dict]) -> None:
    """Run `stage_kills.py` on its `stages` below a run root."""
    job = root / "job.json"
    job.write_text(json.dumps({"root": str(root), "stages": stages}))
    worker = Path(__file__).with_name("stage_kills.py")
    command = [sys.executable, "-W", "ignore", str(worker), str(job)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
