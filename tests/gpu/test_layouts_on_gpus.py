"""On two GPUs no layout changes what is learned in BF16, and each reads the others' checkpoints."""

import json
from functools import partial
from pathlib import Path

import pytest
from gpu_workers import run_worker

LAYOUTS = {
    "dp2": {"data": 2},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "ep2": {"data": 2, "expert": 2},
    "cp2": {"context": 2},
    "tp2-ep2": {"tensor": 2, "expert": 2},
    "cp2-recompute": {"context": 2, "recompute": "full"},
}


run = partial(run_worker, "layout_worker.py", timeout_seconds=300)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("layouts")
    return folder, run(folder, "one", {}, world=1)


@pytest.mark.multigpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_learns_as_one_gpu_does(one, name):
    folder, expected = one
    found = run(folder, name, LAYOUTS[name], world=2)
    gap = max(abs(a - b) for a, b in zip(found["losses"], expected["losses"], strict=True))
    print(f"{name}: {found['losses'][0]:.4f} -> {found['losses'][-1]:.4f}, largest gap {gap:.2e}")
    assert expected["losses"][-1] < 0.9 * expected["losses"][0]
    assert gap <= 1e-2
    assert abs(found["one"] - expected["one"]) <= 1e-3  # the same weights, read by another layout


@pytest.mark.multigpu
def test_one_gpu_reads_what_every_layout_wrote(one):
    folder, _ = one
    written = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert set(LAYOUTS) <= set(written)
    read = run(folder, "read", sorted(written), world=1)
    gaps = {name: abs(read[name] - found["own"]) for name, found in written.items()}
    print(gaps)
    assert max(gaps.values()) <= 1e-3
