"""What a measurement ran on."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """Names and versions of the machine and of what decides its speed."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"gpus": gpus, "processor": platform.processor() or platform.machine(), **_versions()}


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton", "megatron-core", "transformer-engine"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write(path: Path | None, results: dict[str, Any]) -> None:
    """Write results with the machine beside them."""
    if path is not None:
        path.write_text(json.dumps({"machine": describe(), **results}, indent=1) + "\n")
