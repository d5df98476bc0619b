"""Lightning attention against flash-linear-attention and softmax attention, in one process.

    python -m benchmarks.compile_peer    # once, or the peer compiles for minutes
    python -m benchmarks.lightning_attention --json OUT

Each case is first checked (ours against the float64 recurrence on a short input, and against the
peer at full size), then timed as replays of a CUDA graph. The floor is the fewest bytes over the
measured copy bandwidth: forward q, k, v in and o out; backward q, k, v, do in and dq, dk, dv out;
a decoding step the states in and out. A peer that is not installed or fails is named, not timed.
Results are written after every case, so a run that is cut off keeps what it has.

Shapes: T tokens, B sequences, H heads, D head dim.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_timing import copy_bytes_per_second, replay_ms
from benchmarks.lightning_cases import (
    CASES,
    DIM,
    TOLERANCE,
    Attention,
    Case,
    Inputs,
    check_ours,
    check_peer,
    fla,
    make,
    our_layer,
    ours,
    plain_layer,
    relative,
    softmax,
)
from benchmarks.machine import write
from m1_kernels.lightning_attention import (
    lightning_attention_step,
    lightning_slopes,
    reference,
)


def time_attention(attend: Attention, x: Inputs, *, replays: int = 10) -> dict[str, float]:
    """Milliseconds of forward, and of forward with backward."""
    q, k, v = (t.detach().contiguous().requires_grad_() for t in x.qkv.unbind(2))
    with torch.no_grad():
        forward = replay_ms(partial(attend, q, k, v), replays=replays)
    both = replay_ms(
        lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), x.d_out), replays=replays
    )
    return {"forward_ms": forward, "both_ms": both}


def time_layer(layer: Callable[[], torch.Tensor], x: Inputs) -> float:
    """Milliseconds of a layer without its projections, forward with backward."""
    into = (x.qkv, x.gate, x.weight)
    return replay_ms(lambda: torch.autograd.grad(layer(), into, x.d_out.flatten(1)))


def attempt(name: str, work: Callable[[], Any]) -> Any:
    """The result, or None with the reason printed: a peer may be missing or refuse a shape."""
    try:
        return work()
    except (ImportError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        print(f"   {name}: not run, {type(error).__name__}: {reason}", flush=True)
        return None


def run_case(case: Case, bandwidth: float) -> dict[str, Any]:
    x = make(case)
    # Bytes per token and head: forward 4 tensors, backward 7.
    unit_ms = case.tokens * case.heads * DIM * 2 / bandwidth * 1e3
    found: dict[str, Any] = {
        "case": case.name,
        "errors": {"float64": check_ours(case, x)},
        "ours": time_attention(ours(x), x),
        "floor": {"forward_ms": 4 * unit_ms, "both_ms": 11 * unit_ms},
    }
    show(case.name, "ours", found["ours"], found)
    layers = {"ours": lambda: our_layer(x), "ours_plain": lambda: plain_layer(ours(x), x)}
    if case.with_softmax:
        found["softmax"] = attempt("softmax", lambda: time_attention(softmax(case), x, replays=3))
        show(case.name, "softmax", found["softmax"], found)
    peer = attempt("fla", lambda: fla(case, x))
    if peer is not None:
        found["errors"]["peer"] = attempt("fla", lambda: check_peer(x, peer))
    if peer is not None and found["errors"]["peer"] is not None:
        found["fla"] = attempt("fla", lambda: time_attention(peer, x))
        show(case.name, "FLA", found["fla"], found)
        layers["fla"] = lambda: plain_layer(peer, x)
    found["layer_ms"] = {
        name: attempt(f"{name} layer", partial(time_layer, layer, x))
        for name, layer in layers.items()
        if case.with_layer
    }
    if case.with_layer:
        text = ", ".join(f"{name} {ms:.3f}" for name, ms in found["layer_ms"].items() if ms)
        print(f"{case.name:16s} layer f+b ms: {text}", flush=True)
    return found


def show(case: str, name: str, times: dict[str, float] | None, found: dict[str, Any]) -> None:
    if times is None:
        return
    text = f"{case:16s} {name:8s}"
    for key, label in (("forward_ms", "fwd"), ("both_ms", "f+b")):
        ratio = times[key] / found["ours"][key]
        text += (
            f" {label} {times[key]:8.3f} ms {found['floor'][key] / times[key]:4.0%} {ratio:6.2f}x"
        )
    print(text, flush=True)


def run_decode(batch: int, heads: int, bandwidth: float) -> dict[str, Any]:
    """One token for every row, microseconds."""
    slopes = lightning_slopes(heads, layer_index=20, num_layers=80).cuda()
    q, k, v = torch.randn(3, batch, heads, DIM, device="cuda").bfloat16().unbind(0)
    states = torch.randn(batch, heads, DIM, DIM, device="cuda")
    slots = torch.randperm(batch, device="cuda")
    expected = states.clone()
    wanted = reference.step(*(t[:, None] for t in (q, k, v)), slopes, expected, slots)[:, 0]
    out = lightning_attention_step(q, k, v, slopes, states, slots)
    assert relative(out, wanted) <= TOLERANCE
    assert relative(states, expected) <= 1e-6
    inner = 20
    found = {"batch": batch, "heads": heads}
    found["floor_us"] = 2 * states.nbytes / bandwidth * 1e6
    step = partial(lightning_attention_step, q, k, v, slopes, states, slots)
    found["ours_us"] = replay_ms(step, inner=inner) * 1e3

    def peer() -> float:
        from fla.ops.simple_gla import fused_recurrent_simple_gla as recurrent

        token = [t[:, None] for t in (q, k, v)]
        options = {"g_gamma": -slopes, "scale": 1.0, "initial_state": states}
        work = partial(recurrent, *token, output_final_state=True, **options)
        return replay_ms(work, inner=inner) * 1e3

    def vllm() -> float:
        from vllm.model_executor.layers.lightning_attn import linear_decode_forward_triton as decode

        token = [t[:, :, None] for t in (q, k, v)]
        theirs = expected.clone()
        reference.step(*(t[:, None] for t in (q, k, v)), slopes, expected, slots)
        decode(*token, theirs, slopes, slots)
        assert relative(theirs, expected) <= TOLERANCE  # k times v is rounded to bf16 there
        work = partial(decode, *token, states, slopes, slots)
        return replay_ms(work, inner=inner) * 1e3

    with torch.no_grad():
        found["fla_us"] = attempt("fla decode", peer)
        found["vllm_us"] = attempt("vllm decode", vllm)
    share = found["floor_us"] / found["ours_us"]
    print(f"decode B={batch:4d} ours {found['ours_us']:7.1f} us {share:4.0%}", end="")
    for name in ("fla", "vllm"):
        print(f" {name} {found[f'{name}_us'] or float('nan'):7.1f} us", end="")
    print(flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cases", nargs="*", default=[case.name for case in CASES])
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 64, 256])
    options = parser.parse_args()
    bandwidth = copy_bytes_per_second()
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.3f} TB/s", flush=True)
    results: dict[str, Any] = {"copy_bytes_per_second": bandwidth, "cases": [], "decode": []}
    for batch in options.decode:
        results["decode"].append(run_decode(batch, 64, bandwidth))
        write(options.json, results)
    for case in (case for case in CASES if case.name in options.cases):
        results["cases"].append(run_case(case, bandwidth))
        write(options.json, results)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
