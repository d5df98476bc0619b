"""Workers under torchrun and the model they train or sample, for the tests over GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

from m1.config.schema import ModelConfig, MoeConfig

VOCAB = 512
MODEL = ModelConfig(
    num_layers=8,
    hidden_size=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rotary_dim=32,
    moe=MoeConfig(num_experts=4, top_k=2, ffn_hidden_size=256, aux_loss_coefficient=0.0),
    max_position=1024,
    precision="bf16",
)


def run_worker(
    worker: str, folder: Path, name: str, given: dict | list, *, world: int, timeout_seconds: float
) -> dict:
    """What `world` processes of the script beside this file wrote into FOLDER/NAME.json."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world}", str(Path(__file__).with_name(worker))]
    command += [str(folder), name, json.dumps(given)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
        env={**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / f"{name}.json").read_text())
