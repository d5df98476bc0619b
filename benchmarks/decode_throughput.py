"""Decoding: our engine on an M1-shaped model, on its softmax twin, and transformers' generate.

    python -m benchmarks.decode_throughput --json OUT                      one GPU, about 1 B
    python -m benchmarks.decode_throughput --json OUT --laptop             CPU, the laptop recipe
    [--batches 1 16 64 256] [--contexts 1024 16384 65536 262144] [--skip transformers twin]

Contexts are put in place, not computed: what the tokens were does not change the speed. What does
not fit into memory is reported so. transformers computes its contexts, so it takes part up to
`--peer-context`; its prefill is timed apart and subtracted. The twin has the same sizes with
softmax attention in every layer. Also measured: one prompt shared by 16 completions against one
alone, and the cache's memory against `m1 plan`; on a CPU sampling as RL does it, compiled and not.
"""

import argparse
import gc
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import attempt, clock, synchronize, use_processor_time
from benchmarks.machine import write
from m1.config.loading import load_recipe
from m1.config.schema import ModelConfig, MoeConfig, SamplingConfig
from m1.inference.core import EngineCore
from m1.inference.engine import LocalEngine, Request
from m1.inference.limits import EngineLimits
from m1.inference.params import SamplingParams
from m1.inference.sampler import RandomStream
from m1.inference.sequences import Sequence
from m1.model import cpu
from m1.model.build import build_model
from m1.model.hf import export_hf
from m1.model.parallel import initialize
from m1.plan.memory import Decoding, decoding_bytes

LAPTOP = Path(__file__).parents[1] / "pipelines" / "recipes" / "laptop.toml"
MODEL = ModelConfig(
    num_layers=16,
    hidden_size=1536,
    num_heads=16,
    num_kv_heads=2,
    head_dim=128,
    rotary_dim=128,
    moe=MoeConfig(num_experts=8, top_k=2, ffn_hidden_size=1024),
    max_position=262_144 + 4096,
    slope_depth_epsilon=1e-5,
    precision="bf16",
)
VOCAB = 32_768
PAGE = {"cuda": 64, "cpu": 16}


def engine(model: torch.nn.Module, vocab: int, *, batch: int, context: int, new: int) -> EngineCore:
    page = PAGE["cuda" if torch.cuda.is_available() else "cpu"]
    each = -(-(context + new + 1) // page)
    limits = EngineLimits(
        num_slots=batch, num_pages=batch * each, page_size=page, step_tokens=max(8192, batch)
    )
    return EngineCore(model, num_tokens=vocab, limits=limits)


def place(core: EngineCore, *, batch: int, context: int, new: int) -> list[Sequence]:
    """Sequences that already hold `context` tokens."""
    for tensor in (core.cache.states, core.cache.keys, core.cache.values):
        tensor.normal_(std=0.02)
    prompt = (1,) * context
    params = SamplingParams(max_new_tokens=new)
    found = []
    for number in range(batch):
        pages = -(-context // core.limits.page_size)
        sequence = Sequence(
            order=(1, number), prompt=prompt, params=params, random=RandomStream(number)
        )
        sequence.tokens, sequence.length = [1], context
        sequence.slot = core.scheduler.slots.take()
        sequence.pages = [core.scheduler.pages.take() for _ in range(pages)]
        core.scheduler.running.append(sequence)
        found.append(sequence)
    return found


def decode(
    model: torch.nn.Module, config: ModelConfig, vocab: int, case: dict[str, int]
) -> dict[str, Any]:
    """Tokens/s of one batch and context, and the cache's bytes beside the plan's."""
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    core = engine(model, vocab, **case)
    held = (
        (torch.cuda.memory_allocated() - before)
        if torch.cuda.is_available()
        else core.cache.num_bytes
    )
    place(core, **case)
    warm = 8
    for _ in range(warm):
        core.step()
    synchronize()
    started = clock()
    steps = case["new"] - warm - 2
    for _ in range(steps):
        core.step()
    synchronize()
    seconds = clock() - started
    length = core.limits.num_tokens // case["batch"]
    planned = decoding_bytes(config, list(config.layer_kinds), Decoding(case["batch"], length))
    return {
        "tokens_per_second": case["batch"] * steps / seconds,
        "milliseconds_per_step": seconds / steps * 1e3,
        "cache_gib": held / 2**30,
        "cache_over_plan": held / sum(planned),
    }


def shared_prompt(model: torch.nn.Module, vocab: int, *, context: int) -> dict[str, float]:
    """Seconds until the first token of 1 and of 16 completions of one prompt."""
    found = {}
    for count in (1, 16, 1, 16):  # the first pair warms up
        core = engine(model, vocab, batch=16, context=context, new=4)
        core.add(
            tuple(range(1, context + 1)), SamplingParams(max_new_tokens=1), tuple(range(count))
        )
        synchronize()
        started = clock()
        while not core.is_idle:
            core.step()
        synchronize()
        found[f"seconds_{count}"] = clock() - started
        found[f"prefilled_tokens_{count}"] = core.num_prefilled
    return found


def groups_speed(model: torch.nn.Module, vocab: int, *, host_kernel: bool) -> float:
    """Tokens/s of sampling 64 groups of 8, as a step of RL does; completions of 32 tokens."""
    limits = EngineLimits(num_pages=512 * 4, host_kernel=host_kernel)
    local = LocalEngine(model, stop_token=vocab, num_tokens=vocab, limits=limits)
    prompts = torch.randint(5, 100, (64, 24), generator=torch.Generator().manual_seed(1))
    requests = [
        Request(tuple(prompt), tuple(range(8 * i, 8 * i + 8)))
        for i, prompt in enumerate(prompts.tolist())
    ]
    sampling = SamplingConfig(max_new_tokens=32)
    seconds = []
    for _ in range(4):  # the first warms up
        started = clock()
        groups = local.generate(requests, sampling)
        seconds.append(clock() - started)
    return sum(len(c.tokens) for group in groups for c in group) / min(seconds[1:])


def transformers_speed(folder: Path, *, batch: int, context: int, new: int) -> float:
    """Tokens/s of generate, prefill not counted."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
    ids = torch.randint(5, 100, (batch, context), device=device)
    seconds = {}
    with torch.no_grad():
        for count in (2, 2, new):
            synchronize()
            started = clock()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=count,
                max_new_tokens=count,
            )
            synchronize()
            seconds[count] = clock() - started
    return batch * (new - 2) / (seconds[new] - seconds[2])


def beside(
    model: torch.nn.Module, config: ModelConfig, vocab: int, folder: Path, case: dict[str, int],
    rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """Engine and transformers in turns, for neighbours come and go; the median of the ratios."""
    pairs = [
        (
            decode(model, config, vocab, case)["tokens_per_second"],
            transformers_speed(folder, **case),
        )
        for _ in range(rounds)
    ]
    ratios = [ours / theirs for ours, theirs in pairs]
    return {"tokens_per_second": pairs, "median_ratio": statistics.median(ratios)}


def twin_of(config: ModelConfig) -> ModelConfig:
    return config.model_copy(update={"lightning_per_softmax": 0})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--laptop", action="store_true")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64, 256])
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 16384, 65536, 262144])
    parser.add_argument("--peer-context", type=int, default=1024)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument(
        "--rounds", type=int, default=1, help="Best of, on machines with neighbours."
    )
    parser.add_argument(
        "--processor-time", action="store_true", help="Of one thread, on a CPU with neighbours."
    )
    parser.add_argument("--case-seconds", type=int, default=0, help="Limit of a case; 0 for none.")
    parser.add_argument("--skip", nargs="*", default=[], choices=["engine", "transformers", "twin"])
    options = parser.parse_args()
    if options.processor_time:
        use_processor_time()
    cpu.without_compilation()
    initialize()
    config, vocab = (load_recipe([LAPTOP]).model, 1024) if options.laptop else (MODEL, VOCAB)
    results: dict[str, Any] = {"engine": {}, "twin": {}, "transformers": {}}
    for name in ("engine", "twin"):
        if name in options.skip:
            continue
        own = config if name == "engine" else twin_of(config)
        model = build_model(own, vocab_size=vocab, seed=1).eval()
        for batch in options.batches:
            for context in options.contexts:
                case = {"batch": batch, "context": context, "new": options.new}
                rounds = [
                    attempt(
                        lambda m=model, c=own, k=case: decode(m, c, vocab, k),
                        seconds=options.case_seconds,
                    )
                    for _ in range(options.rounds)
                ]
                best = max(rounds, key=lambda found: found.get("tokens_per_second", 0))
                results[name][f"{batch}x{context}"] = best
                print(name, batch, context, best, flush=True)
                write(options.json, {"results": results})
        if name == "engine":
            longest = min(8192, config.max_position - 64, vocab - 2)
            results["shared_prompt"] = attempt(
                lambda m=model, n=longest: shared_prompt(m, vocab, context=n),
                seconds=options.case_seconds,
            )
            print("shared prompt", results["shared_prompt"], flush=True)
            if options.laptop:
                results["groups"] = {
                    name: groups_speed(model, vocab, host_kernel=name == "compiled")
                    for name in ("pytorch", "compiled")
                }
                print("64 groups of 8", results["groups"], flush=True)
        if name == "engine" and "transformers" not in options.skip:
            with tempfile.TemporaryDirectory() as folder:
                export_hf(model, own, Path(folder), eos_token_id=2, pad_token_id=1)
                for batch in options.batches:
                    context = min(options.peer_context, min(options.contexts))
                    case = {"batch": batch, "context": context, "new": options.new}
                    speeds = [
                        attempt(
                            lambda k=case: transformers_speed(Path(folder), **k),
                            seconds=options.case_seconds,
                        )
                        for _ in range(options.rounds)
                    ]
                    best = max((s for s in speeds if isinstance(s, float)), default=speeds[0])
                    results["transformers"][f"{batch}x{context}"] = best
                    print("transformers", batch, context, best, flush=True)
                    write(options.json, {"results": results})
                if options.rounds > 1:
                    case |= {"batch": 32}
                    found = beside(model, own, vocab, Path(folder), case, options.rounds)
                    results["beside"] = found
                    print("in turns", found, flush=True)
        del model
        gc.collect()
    write(options.json, {"processor_time": options.processor_time, "results": results})


if __name__ == "__main__":
    main()
