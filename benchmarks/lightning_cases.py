"""What `benchmarks.lightning_attention` runs: inputs, implementations, and their checks.

Shapes: T tokens, H heads, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from m1_kernels.lightning_attention import (
    gated_norm,
    lightning_attention,
    lightning_attention_qkv,
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


def our_layer(x: Inputs) -> torch.Tensor:
    out = lightning_attention_qkv(x.qkv, x.slopes, x.cu_seqlens)
    return gated_norm(out.flatten(1), x.gate.flatten(1), x.weight, EPS)


def plain_layer(attend: Attention, x: Inputs) -> torch.Tensor:
    out = attend(*(t.contiguous() for t in F.silu(x.qkv).unbind(2))).flatten(1)
    return torch.sigmoid(x.gate.flatten(1)) * F.rms_norm(out, out.shape[-1:], x.weight, EPS)
