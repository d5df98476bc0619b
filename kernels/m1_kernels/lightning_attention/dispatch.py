"""The public entry points: they check their arguments and choose an implementation by device.

Under `torch.autocast` float32 inputs are cast to its type; slopes and states stay float32.

Shapes: T tokens, N sequences, B rows of a batch, H heads, D key dims, E value dims.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from m1_kernels.lightning_attention import checks, reference
from m1_kernels.lightning_attention.collectives import SumOverRanks, add_over_ranks


def lightning_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal lightning attention over packed sequences, differentiable in q, k, v and the state.

    Args:
        q: [T, H, D] in bfloat16, float16 or float32; tokens and heads may be strided. On a GPU D
            and E are 16, 32, 64, 96, 128 or 256.
        k: [T, H, D].
        v: [T, H, E].
        slopes: float32 [H], decay rates from 0 up.
        cu_seqlens: int32 or int64 [N + 1], bounds of the sequences, first 0 and last T.
        initial_state: float32 [N, H, D, E], the states before the sequences, or None for zeros.
        output_final_state: Also return the state after each sequence.
        batch_invariant: Cut a sequence by its own length only, so that its results are bitwise
            the same whatever it is packed with; slower for several long sequences of few heads.

    Returns:
        Outputs [T, H, E] in q's dtype, and float32 final states [N, H, D, E] or None.

    Raises:
        ImportError: The tensors are on a GPU and Triton is not installed.
        ValueError: An argument has a shape, dtype or device that cannot work.
    """
    q, k, v = cast_inputs(q, k, v)
    checks.check_heads(q, k, v, slopes)
    checks.check_bounds(cu_seqlens, q.shape[0], q.device)
    _check_initial(initial_state, k, v, cu_seqlens)
    if q.is_cuda:
        state = None if initial_state is None else initial_state.contiguous()
        out, final, _ = triton_kernels().attention(
            q, k, v, slopes, cu_seqlens, state, output_final_state, batch_invariant
        )
        return out, final if output_final_state else None
    out = _chunked(batch_invariant)(q, k, v, slopes, cu_seqlens, initial_state)
    if not output_final_state:
        return out, None
    return out, reference.final_states(k, v, slopes, cu_seqlens, initial_state)


def lightning_attention_qkv(
    qkv: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Causal lightning attention of q, k, v = SiLU(qkv), what a lightning layer trains with.

    Args:
        qkv: [T, H, 3, D].
        slopes: float32 [H].
        cu_seqlens: int [N + 1].
        batch_invariant: As in `lightning_attention`.

    Returns:
        Outputs [T, H, D] in qkv's dtype.

    Raises:
        ImportError: The tensors are on a GPU and Triton is not installed.
        ValueError: An argument has a shape, dtype or device that cannot work.
    """
    (qkv,) = cast_inputs(qkv)
    checks.check_qkv(qkv, slopes)
    checks.check_bounds(cu_seqlens, qkv.shape[0], qkv.device)
    if qkv.is_cuda:
        out: torch.Tensor = triton_kernels().attention_qkv(
            qkv, slopes, cu_seqlens, batch_invariant
        )[0]
        return out
    q, k, v = F.silu(qkv).unbind(2)
    return _chunked(batch_invariant)(q, k, v, slopes, cu_seqlens)


def lightning_attention_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Attend over prompts and write the state after each into its slot; without gradients.

    Args:
        q: [T, H, D].
        k: [T, H, D].
        v: [T, H, E].
        slopes: float32 [H].
        cu_seqlens: int [N + 1].
        states: float32 [slots, H, D, E], contiguous; rows `slots` are overwritten.
        slots: int [N], no two alike; a negative one drops its sequence's state.
        initial_state: float32 [N, H, D, E], or None for zeros.
        batch_invariant: As in `lightning_attention`.

    Returns:
        Outputs [T, H, E] in q's dtype.

    Raises:
        ImportError: The tensors are on a GPU and Triton is not installed.
        ValueError: An argument has a shape, dtype or device that cannot work.
    """
    checks.check_heads(q, k, v, slopes)
    checks.check_bounds(cu_seqlens, q.shape[0], q.device)
    _check_initial(initial_state, k, v, cu_seqlens)
    shape = (*k.shape[1:], v.shape[-1])
    checks.check_table(states, slots, cu_seqlens.shape[0] - 1, shape, q.device)
    if q.is_cuda:
        state = None if initial_state is None else initial_state.contiguous()
        return triton_kernels().attention_prefill(  # type: ignore[no-any-return]
            q, k, v, slopes, cu_seqlens, states, slots, state, batch_invariant
        )
    final = reference.final_states(k, v, slopes, cu_seqlens, initial_state)
    states[slots[slots >= 0].long()] = final[slots >= 0]
    return _chunked(batch_invariant)(q, k, v, slopes, cu_seqlens, initial_state)


def lightning_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor | None = None,
    *,
    silu: bool = False,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Decode one token, or a few, for each of B rows; updates `states` in place.

    Nothing is read on the host, so that a call can be captured in a CUDA graph.

    Args:
        q: [B, H, D], or [B, S, H, D] for S tokens per row.
        k: As q.
        v: [B, H, E] or [B, S, H, E].
        slopes: float32 [H].
        states: float32 [slots, H, D, E], contiguous.
        slots: int [B], each row's place in the table, no two alike; rows with a negative one are
            left out and give zeros. None: row b has slot b.
        silu: q, k and v pass through SiLU first.
        batch_invariant: A row's results are bitwise the same whatever B is; a little slower from
            about 32 rows on. Otherwise small and large batches may round differently.

    Returns:
        Outputs shaped as v, in q's dtype.

    Raises:
        ImportError: The tensors are on a GPU and Triton is not installed.
        ValueError: An argument has a shape, dtype or device that cannot work.
    """
    if q.dim() == 3:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        return lightning_attention_step(
            q, k, v, slopes, states, slots, silu=silu, batch_invariant=batch_invariant
        ).squeeze(1)
    checks.check_heads(q, k, v, slopes, num_dims=4)
    checks.check_table(states, slots, q.shape[0], (*k.shape[2:], v.shape[-1]), q.device)
    if q.is_cuda:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        return triton_kernels().attention_step(  # type: ignore[no-any-return]
            q, k, v, slopes, states, slots, silu, batch_invariant
        )
    if silu:
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
    return reference.step(q, k, v, slopes, states, slots)


def copy_state(states: torch.Tensor, source: torch.Tensor, targets: torch.Tensor) -> None:
    """Copy one slot's state to G others, for sampling a group from one prompt.

    Args:
        states: float32 [slots, H, D, E], rows `targets` are overwritten.
        source: int [1], the slot of the prompt.
        targets: int [G], slots that differ from each other.
    """
    copies = states.index_select(0, source).expand(targets.shape[0], *states.shape[1:])
    states.index_copy_(0, targets, copies)


def gated_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """sigmoid(gate) * RMSNorm(x) * weight over the last dimension.

    Args:
        x: [T, W].
        gate: [T, W].
        weight: [W].
        eps: Added to the mean square.
        group: Ranks that hold W columns each of every row; the mean is over all their columns.

    Returns:
        [T, W] in x's dtype.
    """
    num_ranks = 1 if group is None else group.size()
    if x.is_cuda:
        add = partial(add_over_ranks, group=group) if group and num_ranks > 1 else None
        return triton_kernels().GatedNormFunction.apply(  # type: ignore[no-any-return]
            x, gate, weight, eps, num_ranks, add
        )
    if num_ranks == 1:
        return torch.sigmoid(gate) * F.rms_norm(x, x.shape[-1:], weight, eps)
    squares = x.float().square().sum(-1, keepdim=True)
    total = SumOverRanks.apply(squares, group)  # type: ignore[no-untyped-call]
    root = torch.rsqrt(total / (x.shape[-1] * num_ranks) + eps)
    return torch.sigmoid(gate) * ((x.float() * root).to(x.dtype) * weight)


def _chunked(batch_invariant: bool) -> Callable[..., torch.Tensor]:
    return reference.chunked_apart if batch_invariant else reference.chunked


def _check_initial(
    state: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor
) -> None:
    if state is not None:
        shape = (cu_seqlens.shape[0] - 1, *k.shape[1:], v.shape[-1])
        checks.check_state("initial_state", state, shape, k.device)


def cast_inputs(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Under autocast float32 tensors in its type."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x.dtype == torch.float32 else x for x in tensors)


def triton_kernels() -> Any:
    """The Triton implementations.

    Raises:
        ImportError: Triton is not installed.
    """
    try:
        from m1_kernels.lightning_attention import on_gpu
    except ImportError as error:
        raise ImportError(
            f"lightning attention on a GPU needs Triton, which cannot be imported ({error}); "
            "pip install triton"
        ) from error
    return on_gpu
