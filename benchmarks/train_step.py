"""Training steps of an M1-shaped model and of a softmax MoE of equal active parameters.

    python -m benchmarks.train_step --json OUT [--lengths 8192 32768 131072] [--precisions bf16 fp8]

MFU = training FLOPs per token (m1.plan.flops: matrix products only, causal attention, the chunked
form of lightning attention, backward counted twice, recomputation not counted) * tokens/s / the
GPU's dense BF16 peak, for both precisions. Both models pass through the same trainer.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import write
from m1.config.schema import ModelConfig, MoeConfig, OptimizerConfig, ParallelConfig
from m1.model.parallel import initialize
from m1.plan.flops import token_flops
from m1.train.microbatch import MicroBatch
from m1.train.trainer import Trainer, cross_entropy

VOCAB = 16_384
TOKENS = 131_072
PEAK_BF16 = 989.4e12
"""FLOP/s of an H100 or H200 SXM, dense (NVIDIA's data sheets)."""
COMMON: dict[str, Any] = {
    "num_layers": 16,
    "hidden_size": 2048,
    "num_heads": 16,
    "num_kv_heads": 2,
    "head_dim": 128,
    "rotary_dim": 64,
    "max_position": TOKENS,
}
MODELS = {
    "m1": ModelConfig(**COMMON, moe=MoeConfig(num_experts=8, top_k=2, ffn_hidden_size=2048)),
    "softmax": ModelConfig(
        **COMMON,
        lightning_per_softmax=0,
        norm="pre",
        moe=MoeConfig(num_experts=8, top_k=2, ffn_hidden_size=2816),
    ),
}


def micro_batches(length: int, micro_tokens: int) -> list[MicroBatch]:
    """TOKENS random tokens in sequences of `length`."""
    size = max(length, micro_tokens)
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(TOKENS // size):
        ids = torch.randint(VOCAB, (size + 1,), generator=generator)
        lengths = torch.tensor([length] * (size // length))
        found.append(MicroBatch(ids[:-1], ids[1:], lengths, torch.full((size,), 1 / TOKENS)))
    return found


def measure(name: str, length: int, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    model = MODELS[name].model_copy(
        update={"precision": precision, "fp8_recipe": options.fp8_recipe}
    )
    recompute = "full" if length > options.no_recompute_up_to else "none"
    parallel = ParallelConfig(recompute=recompute)
    trainer = Trainer(model, OptimizerConfig(lr=1e-4), vocab_size=VOCAB, seed=1, parallel=parallel)
    batches = micro_batches(length, options.micro_tokens)
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(options.warmup + options.steps):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        trainer.update(batches, cross_entropy, lr=1e-4)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    best = sorted(seconds[options.warmup :])[options.steps // 2]
    flops = training_flops(model, length)
    result = {
        "model": name,
        "length": length,
        "precision": precision if precision == "bf16" else f"fp8 {options.fp8_recipe}",
        "recompute": recompute,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "tokens_per_second": TOKENS / best,
        "flops_per_token": flops,
        "mfu": flops * TOKENS / best / PEAK_BF16,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }
    if options.profile:
        result["profile"] = kernel_times(trainer, batches)
    return result


def training_flops(model: ModelConfig, length: int) -> float:
    """FLOPs per token of forward and backward."""
    return float(token_flops(model, VOCAB, sequence_length=length).training)


def kernel_times(trainer: Trainer, batches: list[MicroBatch]) -> list[dict[str, Any]]:
    """The kernels that take most of a step, with their share of the GPU's time."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        trainer.update(batches[:1], cross_entropy, lr=1e-4)
        torch.cuda.synchronize()
    events = [e for e in found.key_averages() if e.device_type == DeviceType.CUDA]
    total = sum(e.self_device_time_total for e in events)
    print(f"   kernels of one micro-batch and its update: {total / 1e3:.1f} ms")
    events.sort(key=lambda e: -e.self_device_time_total)
    return [
        {
            "kernel": e.key[:100],
            "share": round(e.self_device_time_total / total, 4),
            "milliseconds": round(e.self_device_time_total / 1e3, 3),
            "calls": e.count,
        }
        for e in events[:60]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 32_768, 131_072])
    parser.add_argument("--precisions", nargs="*", default=["bf16", "fp8"])
    parser.add_argument("--fp8-recipe", default="tensorwise")
    parser.add_argument("--micro-tokens", type=int, default=16_384)
    parser.add_argument("--no-recompute-up-to", type=int, default=16_384)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    cases = [
        (precision, length, name)
        for precision in options.precisions
        for length in options.lengths
        for name in options.models
    ]
    if len(cases) == 1:
        initialize()
        results = [attempt(*cases[0], options)]
    else:  # a model's memory is not given back in its process
        results = [in_own_process(*case) for case in cases]
    write(options.json, {"results": results})


def attempt(precision: str, length: int, name: str, options: argparse.Namespace) -> dict[str, Any]:
    try:
        found = measure(name, length, precision, options)
    except torch.cuda.OutOfMemoryError as error:
        found = {"model": name, "length": length, "precision": precision}
        found["error"] = str(error).partition(".")[0]
    print({k: v for k, v in found.items() if k != "profile"}, flush=True)
    for row in found.get("profile", [])[:14]:
        print(f"   {row['share']:6.1%} {row['calls']:5d} {row['kernel'][:84]}")
    return found


def in_own_process(precision: str, length: int, name: str) -> dict[str, Any]:
    """Measure one case with this command's options, of which the last given count."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        chosen = ["--models", name, "--lengths", str(length), "--precisions", precision]
        command = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:], *chosen]
        subprocess.run([*command, "--json", str(path)], check=True)
        found: dict[str, Any] = json.loads(path.read_text())["results"][0]
        return found


if __name__ == "__main__":
    main()
