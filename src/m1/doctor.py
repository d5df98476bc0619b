"""What this machine can do for a run: what is there, what is missing, how to get it.

Looking never raises and takes seconds: the looks run side by side and share a time limit.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from m1.doctor_remote import cluster_state, s3_state
from m1.sandbox import bubblewrap

Status = Literal["ok", "missing", "info"]

_NETWORK_SECONDS = 3
_LOOK_SECONDS = 7
_GIB = 2**30
_STYLES: dict[Status, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "missing": ("missing", "yellow"),
    "info": ("info", "dim"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    topic: str
    status: Status
    """`ok`; `missing`: some use needs it; `info`: a fact, or a thing that is optional here."""
    detail: str
    remedy: str = ""
    """What it is needed for and how to get it."""


def examine() -> list[Finding]:
    """Look at everything; a look that fails or takes too long becomes a finding that says so."""
    pool = ThreadPoolExecutor(max_workers=len(_LOOKS), thread_name_prefix="m1-doctor")
    futures = {topic: pool.submit(look) for topic, look in _LOOKS.items()}
    findings = []
    deadline = time.monotonic() + _LOOK_SECONDS
    for topic, future in futures.items():
        try:
            findings.append(future.result(timeout=max(0.0, deadline - time.monotonic())))
        except TimeoutError:
            findings.append(Finding(topic, "info", f"no answer within {_LOOK_SECONDS} s"))
        except Exception as error:  # A doctor reports what it meets, whatever it is.
            findings.append(Finding(topic, "missing", f"{type(error).__name__}: {error}"))
    pool.shutdown(wait=False, cancel_futures=True)
    return findings


def render(findings: list[Finding], console: Console) -> None:
    """Print the findings as a table, remedies below what they mend."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("topic", "", "found"):
        table.add_column(column, no_wrap=column != "found")
    for finding in findings:
        word, style = _STYLES[finding.status]
        found = Text(finding.detail)
        if finding.remedy:
            found.append(f"\n{finding.remedy}", style="dim")
        table.add_row(finding.topic, Text(word, style=style), found)
    console.print(table)


def _python() -> Finding:
    found = platform.python_version()
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        return Finding("Python", "ok", found)
    return Finding("Python", "missing", found, "m1 needs 3.11 to 3.13; make a venv with one.")


def _machine() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    detail = (
        f"{cores} cores; {memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB memory free"
    )
    if memory.available < 3 * _GIB:
        return Finding("CPU and memory", "missing", detail, "The laptop recipe needs about 3 GiB.")
    return Finding("CPU and memory", "ok", detail)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / _GIB
    detail = f"{free:.1f} GiB free in {Path.cwd()}"
    if free < 2:
        remedy = "Checkpoints need room: free some, or set storage.root to another disk."
        return Finding("Disk", "missing", detail, remedy)
    return Finding("Disk", "ok", detail)


def _torch() -> Finding:
    if importlib.util.find_spec("torch") is None:
        remedy = _remedy("training and inference", "cpu")
        return Finding("torch", "missing", "not installed", remedy)
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    threads = torch.get_num_threads()
    backend = f"{capability}, {'with' if has_onednn else 'without'} oneDNN"
    return Finding("torch", "ok", f"{torch.__version__}; {threads} threads, {backend}")


def _gpu() -> Finding:
    purpose = "BF16 and FP8 training of larger recipes; CPU recipes run without."
    if shutil.which("nvidia-smi") is None:
        return Finding("GPU", "info", "none found (no nvidia-smi)", f"A GPU is for {purpose}")
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True, timeout=5, check=False)
    devices = told.stdout.strip().splitlines()
    if told.returncode or not devices:
        detail = (told.stderr or told.stdout).strip().partition("\n")[0] or "nvidia-smi names none"
        return Finding("GPU", "missing", detail, "Check the driver: nvidia-smi must list devices.")
    import torch

    detail = "; ".join(devices)
    if torch.cuda.is_available():
        return Finding("GPU", "ok", detail)
    remedy = f"torch {torch.__version__} cannot use it; install its CUDA build."
    return Finding("GPU", "missing", detail, remedy)


def _transformer_engine() -> Finding:
    remedy = _remedy("FP8 and fused layers on GPUs; CPU recipes run without", "gpu")
    if importlib.util.find_spec("transformer_engine") is None:
        return Finding("Transformer Engine", "info", "not installed", remedy)
    # Its import loads CUDA libraries and can end the process: let it be another one.
    command = [sys.executable, "-c", "import transformer_engine.pytorch"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=6, check=False)
    version = importlib.metadata.version("transformer_engine")
    if told.returncode:
        reason = told.stderr.strip().rpartition("\n")[2]
        return Finding("Transformer Engine", "missing", f"{version}, import: {reason}", remedy)
    return Finding("Transformer Engine", "ok", version)


def _package(name: str, purpose: str, extra: str, *, is_optional: bool = False) -> Finding:
    remedy = _remedy(purpose, extra)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "info" if is_optional else "missing", "not installed", remedy)
    bounds = _bounds(name)
    if bounds and not _is_within(version, bounds):
        return Finding(name, "missing", f"{version}, but m1 works with {bounds}", remedy)
    return Finding(name, "ok", version)


def _bounds(name: str) -> str:
    """What m1's own metadata asks of a package, such as `<4,>=3.8`."""
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires("m1") or ():
        requirement = Requirement(line)
        if requirement.name == name:
            return str(requirement.specifier)
    return ""


def _is_within(version: str, bounds: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(bounds).contains(version, prereleases=True)


def _remedy(purpose: str, extra: str) -> str:
    return f"For {purpose}: pip install 'm1[{extra}]'."


def _sandbox() -> Finding:
    purpose = "Only for rewards that run programs the model wrote"
    reason = bubblewrap.failure()
    if reason is not None:
        return Finding("Sandbox", "missing", reason, f"{purpose}: mend this.")
    program, weaknesses = bubblewrap.find_bubblewrap(), bubblewrap.weaknesses()
    if weaknesses:
        return Finding("Sandbox", "info", f"{program}, but {'; '.join(weaknesses)}", purpose + ".")
    return Finding("Sandbox", "ok", f"{program}, isolates programs and bounds memory")


def _cgroup() -> Finding:
    root = Path("/sys/fs/cgroup")
    is_v2 = (root / "cgroup.controllers").exists()
    remedy = "Sandboxes then limit memory by rlimit only; run as root or in a delegated cgroup."
    version, folder = ("v2", root) if is_v2 else ("v1", root / "memory")
    if not folder.exists():
        return Finding("cgroup", "info", "none mounted", remedy)
    if os.access(folder, os.W_OK):
        return Finding("cgroup", "ok", f"{version}, writable")
    return Finding("cgroup", "info", f"{version}, not writable", remedy)


def _s3() -> Finding:
    is_ok, detail = s3_state(timeout_seconds=_NETWORK_SECONDS)
    if is_ok:
        return Finding("S3", "ok", detail)
    remedy = "For s3:// storage set S3_ENDPOINT, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
    return Finding("S3", "info" if is_ok is None else "missing", detail, remedy)


def _cluster() -> Finding:
    is_ok, detail = cluster_state(timeout_seconds=_NETWORK_SECONDS)
    if is_ok:
        return Finding("Cluster", "ok", detail)
    remedy = "For m1 submit: set KUBECONFIG to a cluster with Kubeflow Pipelines."
    return Finding("Cluster", "info" if is_ok is None else "missing", detail, remedy)


_LOOKS: dict[str, Callable[[], Finding]] = {
    "Python": _python,
    "CPU and memory": _machine,
    "Disk": _disk,
    "torch": _torch,
    "megatron-core": lambda: _package("megatron-core", "the model and its training", "cpu"),
    "GPU": _gpu,
    "Transformer Engine": _transformer_engine,
    "triton": lambda: _package("triton", "the GPU kernels", "gpu", is_optional=True),
    "kfp": lambda: _package("kfp", "running and compiling pipelines", "pipelines"),
    "mlflow": lambda: _package("mlflow", "lineage", "pipelines"),
    "Sandbox": _sandbox,
    "cgroup": _cgroup,
    "S3": _s3,
    "Cluster": _cluster,
}
