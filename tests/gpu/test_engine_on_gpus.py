"""The engine over two GPUs: the same completions under every layout, and weights sent by NCCL."""

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from gpu_workers import run_worker

LAYOUTS = {
    "tp2": {"tensor": 2},
    "ep2": {"data": 2, "expert": 2},
    "tp2-ep2": {"tensor": 2, "expert": 2},
}
BROADCAST = Path(__file__).parents[1] / "unit/inference/broadcast_worker.py"


run = partial(run_worker, "engine_layout_worker.py", timeout_seconds=200)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("engines")
    return folder, run(folder, "one", {}, world=1)


@pytest.mark.multigpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_gpus_sample_what_one_does(one, name):
    folder, alone = one
    found = run(folder, name, LAYOUTS[name], world=2)
    assert found["fp32"]["tokens"] == alone["fp32"]["tokens"]
    gap = max(
        abs(a - b)
        for ours, theirs in zip(found["fp32"]["logprobs"], alone["fp32"]["logprobs"], strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    assert gap <= 1e-4
    correlation = found["bf16"]["correlation"]
    print(f"{name}: largest gap in FP32 {gap:.1e}, BF16 engine to trainer {correlation:.6f}")
    assert correlation >= 0.9995


@pytest.mark.multigpu
def test_nccl_brings_a_trainers_weights_to_an_engine():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, str(BROADCAST), role, address, "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": str(device)},
        )
        for device, role in enumerate(("trainer", "engine"))
    ]
    try:
        out, error = processes[1].communicate(timeout=150)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert out.strip().splitlines()[-1:] == ["done"], error
