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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu_timing import copy_bytes_per_second, replay_ms
from benchmarks.machine import write
from m1_kernels.lightning_attention import (
    gated_norm,
    lightning_attention,
    lightning_attention_qkv,
    lightning_attention_step,
    lightning_slopes,
    reference,
)

DIM = 128
EPS = 1e-6
TOLERANCE = 3.5e-3
PEER_TOLERANCE = 8e-3
"""Two bf16 implementations, each within about 3e-3 to 5e-3 of the exact result."""


@dataclass(frozen=True)
class Case:
    """Sequence lengths and heads."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    with_softmax: bool = False
    with_layer: bool = False

    @property
    def tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @property
    def is_uniform(self) -> bool:
        """Whether all sequences have one length."""
        return len(set(self.lengths)) == 1


CASES = (
    Case("8x2048", (2048,) * 8, 64, with_softmax=True, with_layer=True),
    Case("1x32K", (32_768,), 64, with_softmax=True, with_layer=True),
    Case("8 heads 1x32K", (32_768,), 8, with_layer=True),
    Case("8 heads 1x131K", (131_072,), 8),
    Case("1x131K", (131_072,), 64),
    Case("mixed 16K", (5000, 100, 3777, 1, 2048, 4096, 63, 1299), 64),
)
"""The peer tunes itself anew for packed sequences, which takes the longest: they come last."""


@dataclass(frozen=True)
class Inputs:
    """A fused projection [T, H, 3, D], a gate and gradients of the outputs [T, H, D]."""

    qkv: torch.Tensor
    gate: torch.Tensor
    weight: torch.Tensor
    d_out: torch.Tensor
    slopes: torch.Tensor
    cu_seqlens: torch.Tensor


def make(case: Case) -> Inputs:
    torch.manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    shape = (case.tokens, case.heads, DIM)
    return Inputs(
        qkv=draw(case.tokens, case.heads, 3, DIM).requires_grad_(),
        gate=draw(*shape).requires_grad_(),
        weight=torch.ones(case.heads * DIM, device="cuda", dtype=torch.bfloat16).requires_grad_(),
        d_out=draw(*shape),
        slopes=lightning_slopes(case.heads, layer_index=20, num_layers=80).cuda(),
        cu_seqlens=torch.tensor([0, *case.lengths]).cumsum(0).int().cuda(),
    )


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ours(x: Inputs) -> Attention:
    return lambda q, k, v: lightning_attention(q, k, v, x.slopes, x.cu_seqlens)[0]


def fla(case: Case, x: Inputs) -> Attention:
    from fla.ops.simple_gla import chunk_simple_gla

    batch = len(case.lengths) if case.is_uniform else 1
    options: dict[str, Any] = {"g_gamma": -x.slopes, "scale": 1.0}
    if not case.is_uniform:
        options["cu_seqlens"] = x.cu_seqlens.long()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        split = (t.view(batch, -1, case.heads, DIM) for t in (q, k, v))
        out: torch.Tensor = chunk_simple_gla(*split, **options)[0]
        return out.reshape(-1, case.heads, DIM)

    return attend


def softmax(case: Case) -> Attention:
    batch = len(case.lengths)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        split = (t.view(batch, -1, case.heads, DIM).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(*split, is_causal=True)
        return out.transpose(1, 2).reshape(-1, case.heads, DIM)

    return attend


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius error, a piece at a time so that large tensors need no float64 copy."""
    pairs = zip(found.split(8192), expected.split(8192), strict=True)
    parts = [
        ((a.double() - b.double()).square().sum(), b.double().square().sum()) for a, b in pairs
    ]
    return float((sum(a for a, _ in parts) / sum(b for _, b in parts)) ** 0.5)


def results(attend: Attention, x: Inputs, q: torch.Tensor, *kv: torch.Tensor) -> list[torch.Tensor]:
    out = attend(q, *kv)
    return [out.detach(), *torch.autograd.grad(out, (q, *kv), x.d_out[: q.shape[0]])]


def check_ours(case: Case, x: Inputs) -> float:
    """Error of outputs and gradients against float64 on 200 tokens."""
    short = [t.detach()[:200].contiguous().requires_grad_() for t in x.qkv.unbind(2)]
    cu_seqlens = torch.tensor([0, 61, 200], device="cuda", dtype=torch.int32)
    exact = [t.detach().double().requires_grad_() for t in short]

    def recur(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return reference.recurrent(q, k, v, x.slopes, cu_seqlens)[0]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return lightning_attention(q, k, v, x.slopes, cu_seqlens)[0]

    pairs = zip(results(attend, x, *short), results(recur, x, *exact), strict=True)
    error = max(relative(a, b) for a, b in pairs)
    if not error <= TOLERANCE:
        raise SystemExit(f"{case.name}: error {error:.2e} against float64 exceeds {TOLERANCE}")
    return error


def check_peer(x: Inputs, peer: Attention) -> float:
    """Difference of outputs and gradients between ours and the peer at full size."""
    full = [t.detach().contiguous().requires_grad_() for t in x.qkv.unbind(2)]
    pairs = zip(results(ours(x), x, *full), results(peer, x, *full), strict=True)
    error = max(relative(a, b) for a, b in pairs)
    if not error <= PEER_TOLERANCE:
        raise ValueError(f"differs from ours by {error:.2e}, more than {PEER_TOLERANCE}")
    return error


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


def our_layer(x: Inputs) -> torch.Tensor:
    out = lightning_attention_qkv(x.qkv, x.slopes, x.cu_seqlens)
    return gated_norm(out.flatten(1), x.gate.flatten(1), x.weight, EPS)


def plain_layer(attend: Attention, x: Inputs) -> torch.Tensor:
    out = attend(*(t.contiguous() for t in F.silu(x.qkv).unbind(2))).flatten(1)
    return torch.sigmoid(x.gate.flatten(1)) * F.rms_norm(out, out.shape[-1:], x.weight, EPS)


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

    with torch.no_grad():
        found["fla_us"] = attempt("fla decode", peer)
    share = found["floor_us"] / found["ours_us"]
    print(f"decode B={batch:4d} ours {found['ours_us']:7.1f} us {share:4.0%}", end="")
    print(f" FLA {found['fla_us']:7.1f} us" if found["fla_us"] else "", flush=True)
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
