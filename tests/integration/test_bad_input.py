"""What a user can get wrong: each mistake names cause and remedy, and loses nothing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from m1.config.loading import load_recipe
from m1.launch import finished_stages, run_stage
from m1.types import M1Error

ROOT = Path(__file__).parents[2]
MINI = ROOT / "tests/recipes/mini.toml"


def recipe_at(root: Path, *overrides: str):
    return load_recipe([MINI], overrides=[f"storage.root={root}", *overrides])


def test_mistakes_of_a_recipe_are_listed_together_with_suggestions(m1, tmp_path):
    finished = m1(
        "run",
        str(MINI),
        f"--set=storage.root={tmp_path}",
        "--set=rl.grup_size=4",
        "--set=sft.num_steps=many",
        "--set=rl.group_size=1",
    )
    assert finished.returncode == 1
    assert "rl.grup_size" in finished.stderr and "group_size" in finished.stderr
    assert "sft.num_steps" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not list(tmp_path.iterdir())


def test_a_group_of_one_is_refused_with_the_reason(m1, tmp_path):
    finished = m1("run", str(MINI), "--set=rl.group_size=1")
    assert finished.returncode == 1
    assert "advantages need at least 2 completions" in finished.stderr


def test_an_empty_corpus_names_what_was_read_and_dropped(m1, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("short")
    source = f'data.sources=[{{name="mine", kind="folder", uri="{corpus}"}}]'
    finished = m1("run", str(MINI), f"--set=storage.root={tmp_path}/runs", f"--set={source}")
    assert finished.returncode == 1
    assert "no documents are left" in finished.stderr and "too_short" in finished.stderr
    assert "stage data failed" in finished.stderr


def test_an_unwritable_run_root_is_named(m1, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    finished = m1("run", str(MINI), f"--set=storage.root={blocker}/runs")
    assert finished.returncode == 1
    assert str(blocker) in finished.stderr and "Traceback" not in finished.stderr


def test_a_missing_bucket_is_named_with_the_remedy(m1, s3_server, tmp_path):
    finished = m1(
        "run",
        str(MINI),
        "--set=storage.root=s3://no-such-bucket/m1",
        f"--set=storage.scratch={tmp_path}",
        **s3_server.environment,
    )
    assert finished.returncode == 1
    assert "no-such-bucket" in finished.stderr and "Traceback" not in finished.stderr


@pytest.fixture(scope="module")
def trained(m1, tmp_path_factory) -> Path:
    """A run root with finished data and pretrain stages."""
    root = tmp_path_factory.mktemp("trained")
    for stage in ("data", "pretrain"):
        assert m1("stage", stage, str(MINI), f"--set=storage.root={root}").returncode == 0
    return root


def test_a_corrupt_shard_of_an_earlier_stage_is_named_and_costs_nothing_else(trained, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(trained, root)
    recipe = recipe_at(root)
    for folder in root.glob("stages/*/pointer.json"):
        folder.write_text(folder.read_text().replace(str(trained), str(root)))
    pointers = finished_stages(recipe)
    shard = next(Path(pointers["pretrain"].uri).glob("checkpoint/*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(M1Error, match=r"pretrain.*corrupt.*Delete"):
        run_stage("sft", recipe)
    assert finished_stages(recipe)["data"] == pointers["data"]


@pytest.mark.exhaustive  # three runs
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_full_disk_is_named_and_the_run_goes_on_after_making_room(m1, trained, tmp_path):
    mounted = tmp_path / "small"
    mounted.mkdir()
    size = sum(p.stat().st_size for p in trained.rglob("*") if p.is_file()) + 600_000
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mounted)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        root = mounted / "runs"
        shutil.copytree(trained, root)
        for path in root.glob("stages/*/pointer.json"):
            path.write_text(path.read_text().replace(str(trained), str(root)))
        arguments = ("stage", "sft", str(MINI), f"--set=storage.root={root}")
        finished = m1(*arguments)
        assert finished.returncode == 1, finished.stdout
        assert "free space" in finished.stderr and "Traceback" not in finished.stderr
        assert set(finished_stages(recipe_at(root))) == {"data", "pretrain"}
        remount = ["mount", "-o", f"remount,size={size * 4}", str(mounted)]
        subprocess.run(remount, check=True)
        assert m1(*arguments).returncode == 0
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=True)
