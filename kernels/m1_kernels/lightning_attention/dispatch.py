"""The public entry points, which choose an implementation by device."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from m1_kernels.lightning_attention import reference


def lightning_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal lightning attention over packed sequences.

    Args:
        q: [T, H, D].
        k: [T, H, D].
        v: [T, H, E].
        slopes: float32 [H], decay rates.
        cu_seqlens: int [N + 1], bounds of the sequences, first 0 and last T.
        output_final_state: Also return the state after each sequence.

    Returns:
        Outputs [T, H, E] in q's dtype, and float32 final states [N, H, D, E] or None.

    Raises:
        ImportError: The tensors are on a GPU and Triton is not installed.
    """
    if q.is_cuda:
        attend = _triton().lightning_attention_triton
        return attend(q, k, v, slopes, cu_seqlens, output_final_state=output_final_state)  # type: ignore[no-any-return]
    out = reference.chunked(q, k, v, slopes, cu_seqlens)
    final = reference.final_states(k, v, slopes, cu_seqlens) if output_final_state else None
    return out, final


def lightning_attention_qkv(
    qkv: torch.Tensor, slopes: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """Causal lightning attention of q, k, v = SiLU(qkv), what a lightning layer trains with.

    Args:
        qkv: [T, H, 3, D].
        slopes: float32 [H].
        cu_seqlens: int [N + 1].

    Returns:
        Outputs [T, H, D] in qkv's dtype.
    """
    if qkv.is_cuda:
        return _triton().lightning_attention_qkv_triton(qkv, slopes, cu_seqlens)  # type: ignore[no-any-return]
    q, k, v = F.silu(qkv).unbind(2)
    return reference.chunked(q, k, v, slopes, cu_seqlens)


def gated_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """sigmoid(gate) * RMSNorm(x) * weight over the last dimension.

    Args:
        x: [T, W].
        gate: [T, W].
        weight: [W].
        eps: Added to the mean square.

    Returns:
        [T, W] in x's dtype.
    """
    if x.is_cuda:
        return _triton().GatedNormFunction.apply(x, gate, weight, eps)  # type: ignore[no-any-return]
    return torch.sigmoid(gate) * F.rms_norm(x, x.shape[-1:], weight, eps)


@cache
def _triton() -> Any:
    try:
        from m1_kernels.lightning_attention import on_gpu
    except ImportError as error:
        raise ImportError(
            f"lightning attention on a GPU needs Triton, which cannot be imported ({error}); "
            "pip install triton"
        ) from error
    return on_gpu


def lightning_attention_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """One decoding step for B sequences; `state` float32 [B, H, D, E] is updated in place.

    Args:
        q: [B, H, D].
        k: [B, H, D].
        v: [B, H, E].
        slopes: float32 [H].
        state: float32 [B, H, D, E].

    Returns:
        Outputs [B, H, E] in q's dtype.
    """
    return reference.step(q, k, v, slopes, state)
