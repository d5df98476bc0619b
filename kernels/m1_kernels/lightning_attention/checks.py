"""Arguments of the public functions: wrong shapes, types and devices are refused by name.

Nothing here waits for a GPU. Values that live there (the bounds of `cu_seqlens`, the sign of
slopes, slots) are looked at only with M1_KERNELS_DEBUG=1 in the environment; on a CPU they always
are, for looking costs nothing there.

Shapes: T tokens, N sequences, H heads, D key dims, E value dims.
"""

import os

import torch

HEAD_DIMS = (16, 32, 64, 96, 128, 256)
"""Head dims of the Triton kernels; those in plain torch take any."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor, *, num_dims: int = 3
) -> None:
    """Check q, k [..., H, D], v [..., H, E] and slopes [H]."""
    names = {3: ("[T, H, D]", "[T, H, E]"), 4: ("[B, S, H, D]", "[B, S, H, E]")}[num_dims]
    for name, x, shape in (("q", q, names[0]), ("k", k, names[0]), ("v", v, names[1])):
        if x.dim() != num_dims:
            raise ValueError(f"{name} has shape {list(x.shape)}; give it as {shape}")
        _check_kind(name, x)
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype} and q is {q.dtype}; give q, k and v one dtype")
        _check_device(name, x, q.device, "q")
    if k.shape != q.shape:
        raise ValueError(f"k has shape {list(k.shape)}; it must be that of q, {list(q.shape)}")
    if v.shape[:-1] != q.shape[:-1]:
        raise ValueError(
            f"v has shape {list(v.shape)}; all but its last size must be those of q, "
            f"{list(q.shape)}"
        )
    check_head_dim("q", q)
    check_head_dim("v", v)
    check_slopes(slopes, q.shape[-2], q.device)


def check_qkv(qkv: torch.Tensor, slopes: torch.Tensor) -> None:
    """Check a fused projection [T, H, 3, D] and slopes [H]."""
    if qkv.dim() != 4 or qkv.shape[2] != 3:
        raise ValueError(f"qkv has shape {list(qkv.shape)}; give it as [T, H, 3, D]")
    _check_kind("qkv", qkv)
    check_head_dim("qkv", qkv)
    check_slopes(slopes, qkv.shape[1], qkv.device)


def check_head_dim(name: str, x: torch.Tensor) -> None:
    """Check the last size of a tensor that a kernel reads."""
    if x.is_cuda and x.shape[-1] not in HEAD_DIMS:
        raise ValueError(
            f"{name} has head dim {x.shape[-1]}; the kernels take {', '.join(map(str, HEAD_DIMS))}"
        )


def check_slopes(slopes: torch.Tensor, num_heads: int, device: torch.device) -> None:
    """Check decay rates: float32 [H], finite and not negative."""
    if slopes.dtype != torch.float32 or slopes.shape != (num_heads,):
        raise ValueError(
            f"slopes is {slopes.dtype} {list(slopes.shape)}; give float32 [{num_heads}], one "
            "decay rate for each head"
        )
    _check_device("slopes", slopes, device, "q")
    if _may_look(slopes) and not bool(((slopes >= 0) & slopes.isfinite()).all()):
        raise ValueError(f"slopes are {slopes.tolist()}; decay rates are finite and at least 0")


def check_bounds(cu_seqlens: torch.Tensor, num_tokens: int, device: torch.device) -> None:
    """Check the bounds of packed sequences: int [N + 1], 0 first, T last, never falling."""
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}; give int32 or int64 "
            "[N + 1]"
        )
    if cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens has {cu_seqlens.shape[0]} entries; one sequence takes two")
    if not cu_seqlens.is_contiguous():
        raise ValueError("cu_seqlens is strided; call contiguous() on it")
    _check_device("cu_seqlens", cu_seqlens, device, "q")
    if not _may_look(cu_seqlens):
        return
    is_rising = bool((cu_seqlens.diff() >= 0).all())
    if not is_rising or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != num_tokens:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.tolist()}; it must rise from 0 to the {num_tokens} tokens "
            "given"
        )


def check_state(
    name: str, state: torch.Tensor, shape: tuple[int, ...], device: torch.device
) -> None:
    """Check float32 states of a known shape."""
    if state.dtype != torch.float32 or tuple(state.shape) != shape:
        raise ValueError(f"{name} is {state.dtype} {list(state.shape)}; give float32 {list(shape)}")
    _check_device(name, state, device, "q")


def check_table(
    states: torch.Tensor,
    slots: torch.Tensor | None,
    num_rows: int,
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    """Check a table of states [slots, H, D, E] and the rows' places in it, int [B]."""
    check_state("states", states, (states.shape[0], *shape), device)
    if not states.is_contiguous():
        raise ValueError(
            f"states has strides {states.stride()}; it is updated in place and must be contiguous"
        )
    if slots is None:
        if states.shape[0] != num_rows:
            raise ValueError(
                f"states has {states.shape[0]} slots for {num_rows} rows; give slots, or a slot "
                "for every row"
            )
        return
    if slots.dtype not in (torch.int32, torch.int64) or slots.shape != (num_rows,):
        raise ValueError(
            f"slots is {slots.dtype} {list(slots.shape)}; give int32 or int64 [{num_rows}]"
        )
    _check_device("slots", slots, device, "q")
    if not _may_look(slots):
        return
    used = slots[slots >= 0]
    if int(slots.max()) >= states.shape[0] or len(set(used.tolist())) != used.numel():
        raise ValueError(
            f"slots is {slots.tolist()}; slots that are not negative must differ and lie below "
            f"{states.shape[0]}"
        )


def _check_kind(name: str, x: torch.Tensor) -> None:
    accepted = (*DTYPES, torch.float64) if not x.is_cuda else DTYPES
    if x.dtype not in accepted:
        raise ValueError(f"{name} is {x.dtype}; the kernels take {', '.join(map(str, accepted))}")


def _check_device(name: str, x: torch.Tensor, device: torch.device, other: str) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} and {other} on {device}; move it there")


def _may_look(x: torch.Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or os.environ.get("M1_KERNELS_DEBUG") == "1"
