"""Stages whose results live on S3: uploaded when finished, downloaded and verified where needed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from m1.config.loading import load_recipe
from m1.launch import finished_stages
from m1.storage import open_storage

ROOT = Path(__file__).parents[2]
MINI = ROOT / "tests/recipes/mini.toml"


def test_a_stage_reads_from_s3_what_another_machine_wrote(
    s3_bucket, s3_server, tmp_path, monkeypatch
):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    root = f"s3://{s3_bucket}/runs"

    def stage(name: str, scratch: Path) -> None:
        program = "from m1.cli import main; main()"
        sets = [f"--set=storage.root={root}", f"--set=storage.scratch={scratch}"]
        subprocess.run(
            [sys.executable, "-c", program, "stage", name, str(MINI), *sets],
            cwd=ROOT,
            env=os.environ,
            check=True,
            capture_output=True,
            timeout=600,
        )

    stage("data", tmp_path / "first")
    shutil.rmtree(tmp_path / "first")  # the machine that made the data is gone
    stage("pretrain", tmp_path / "second")
    pointers = finished_stages(load_recipe([MINI], overrides=[f"storage.root={root}"]))
    assert list(pointers) == ["data", "pretrain"]
    assert pointers["pretrain"].uri.startswith(root)
    kept = open_storage(root).list("stages")
    assert any(key.endswith("output/checkpoint/.metadata") for key in kept)
    assert any(key.endswith("metrics.jsonl") for key in kept)
