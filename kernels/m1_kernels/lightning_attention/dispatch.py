"""The public entry points, which choose an implementation by device."""

from collections.abc import Callable
from functools import cache

import torch

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
        return _on_gpu()(q, k, v, slopes, cu_seqlens, output_final_state=output_final_state)
    out = reference.chunked(q, k, v, slopes, cu_seqlens)
    final = reference.final_states(k, v, slopes, cu_seqlens) if output_final_state else None
    return out, final


@cache
def _on_gpu() -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    try:
        from m1_kernels.lightning_attention.chunk import lightning_attention_triton
    except ImportError as error:
        raise ImportError(
            f"lightning attention on a GPU needs Triton, which cannot be imported ({error}); "
            "pip install triton"
        ) from error
    return lightning_attention_triton


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
