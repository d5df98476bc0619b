"""Lightning attention on a GPU: how the walks of `walk.py` are launched, forward and backward.

Where sequences times heads are few, sequences are cut into segments: local states, a scan over the
segments of a sequence, then the walk. Sums run in float32 in a fixed order; results do not depend
on the run.

Shapes: T tokens, N sequences, M segments, H heads, D key dims, E value dims.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from m1_kernels.lightning_attention.walk import CHUNK, scan_kernel, walk_kernel

ENOUGH_PROGRAMS = 128
"""Walks that keep a large GPU busy; below, sequences are cut into segments."""
WANTED_PROGRAMS = 128
SEGMENT_TOKENS = (512, 4096)
"""Fewest and most tokens of a segment."""


@dataclass(frozen=True)
class Plan:
    """How sequences are cut: M segments of at most so many tokens, or M = N whole sequences."""

    num_sequences: int
    num_segments: int
    segment_tokens: int
    is_cut: bool

    @property
    def power(self) -> int:
        """Lanes that hold every sequence."""
        return triton.next_power_of_2(self.num_sequences) if self.is_cut else 1


def plan(
    num_tokens: int, num_sequences: int, num_walks: int, *, batch_invariant: bool = False
) -> Plan:
    """Choose segments from shapes alone.

    Args:
        num_tokens: T of the whole packing.
        num_sequences: N.
        num_walks: Programs per sequence: heads times slices.
        batch_invariant: Decide by the heads alone, so that a sequence's results do not depend on
            what else is packed.
    """
    least, most = SEGMENT_TOKENS
    if batch_invariant:
        is_enough, length = num_walks >= ENOUGH_PROGRAMS, most
    else:
        is_enough = num_sequences * num_walks >= ENOUGH_PROGRAMS
        length = max(num_tokens * num_walks // WANTED_PROGRAMS, 1)
        length = min(max(1 << (length.bit_length() - 1), least), most)
    if is_enough or (not batch_invariant and num_tokens <= length):
        return Plan(num_sequences, num_sequences, 0, is_cut=False)
    return Plan(num_sequences, num_tokens // length + num_sequences, length, is_cut=True)


@dataclass(frozen=True)
class Tile:
    """How one program works: columns of values, warps, loads ahead, and the type of products."""

    columns: int
    warps: int
    stages: int
    compute: Any
    precision: str

    @property
    def is_peeled(self) -> bool:
        """Whole chunks apart from the others: pays where loads run ahead, and compiles longer."""
        return self.stages > 1 or triton.knobs.runtime.interpret


def tile(dtype: torch.dtype, head_dim: int, width: int) -> Tile:
    """Chosen on sm_90: the bf16 walks up to 128 spill 30 numbers at most.

    float16 products run in tf32, which holds float16 exactly and has the range that the decay
    about the chunk's middle needs; float32 ones as three tf32 products.
    """
    size = triton.next_power_of_2(max(head_dim, width))
    columns = min(64, triton.next_power_of_2(width))
    if dtype == torch.bfloat16 and not triton.knobs.runtime.interpret:
        if size > 128:
            return Tile(columns, 8, 2, tl.bfloat16, "tf32")
        return Tile(columns, 4, 4, tl.bfloat16, "tf32")
    columns = min(32, columns)
    if dtype == torch.float32:
        return Tile(columns, 4, 1, tl.float32, "tf32x3")
    # Triton's interpreter multiplies the bit patterns of bfloat16; in float32 it is right.
    return Tile(columns, 4, 1, tl.float32, "tf32")


@dataclass(frozen=True)
class Walk:
    """One pass over all segments; q @ (k^T v), read by the role that each operand has in it."""

    slopes: torch.Tensor
    cu_seqlens: torch.Tensor
    plan: Plan
    backwards: bool = False
    is_transposed: bool = False
    """States are [*, H, E, D]: keys and values have changed places."""

    def run(
        self,
        q: torch.Tensor | None,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
        state: torch.Tensor | None = None,
        end: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
    ) -> None:
        """Write outputs [T, H, E] into `out`, and states at the segments' ends into `end`.

        Args:
            q: [T, H, D], or None to carry states only.
            k: [T, H, D].
            v: [T, H, E].
            out: [T, H, E], given with q.
            state: float32 [M, H, D, E] that enters the segments, or None for zeros.
            end: float32 [M, H, D, E], or a table [slots, H, D, E] with `slots`.
            slots: int [N], rows of the table; negative ones are left out.
        """
        num_heads, head_dim = k.shape[1:]
        width, plan = v.shape[-1], self.plan
        how = tile(k.dtype, head_dim, width)
        source, target = k if q is None else q, k if out is None else out
        grid = (triton.cdiv(width, how.columns), plan.num_segments * num_heads)
        walk_kernel[grid](
            source, k, v, target, self.slopes, self.cu_seqlens,
            k if state is None else state, k if end is None else end,
            self.cu_seqlens if slots is None else slots,
            plan.num_sequences, num_heads, plan.segment_tokens,
            *source.stride()[:2], *k.stride()[:2], *v.stride()[:2], *target.stride()[:2],
            D=head_dim, D_POWER=triton.next_power_of_2(head_dim), E=width,
            C=CHUNK, BE=how.columns, N_POWER=plan.power, IS_CUT=plan.is_cut,
            BACKWARDS=self.backwards, HAS_STATE=state is not None,
            IS_TRANSPOSED=self.is_transposed, KEEP_STATE=end is not None,
            HAS_SLOTS=slots is not None, WITH_OUTPUT=q is not None,
            COMPUTE=how.compute, PRECISION=how.precision, STAGES=how.stages, PEEL=how.is_peeled,
            num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip

    def scan(
        self,
        local: torch.Tensor,
        given: torch.Tensor | None,
        *,
        last: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """States that enter the segments [M, H, *, *]; those after the sequences go to `last`.

        Args:
            local: float32 [M, H, *, *], the state of every segment alone.
            given: float32 [N, H, *, *] that enters the sequences, or None for zeros.
            last: float32 [N, H, *, *], or a table with `slots`.
            slots: int [N].
        """
        num_heads, rows, columns = local.shape[1:]
        entering = torch.empty_like(local)
        size, block = rows * columns, min(1024, triton.next_power_of_2(rows * columns))
        scan_kernel[(triton.cdiv(size, block), self.plan.num_sequences * num_heads)](
            local, entering, local if last is None else last, local if given is None else given,
            self.slopes, self.cu_seqlens, self.cu_seqlens if slots is None else slots,
            num_heads, self.plan.segment_tokens,
            SIZE=size, BLOCK=block, BACKWARDS=self.backwards,
            HAS_GIVEN=given is not None, KEEP_LAST=last is not None, HAS_SLOTS=slots is not None,
            STAGES=4, num_warps=4,
        )  # fmt: skip
        return entering


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    forward: Walk,
    *,
    out: torch.Tensor,
    initial: torch.Tensor | None = None,
    final: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    local: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Write outputs and final states; returns the states that enter the segments, if cut.

    `local` [M, H, D, E] spares a cut walk its segments' states where `local_states` made them.
    """
    entering = initial
    if forward.plan.is_cut:
        local = segment_states(forward, k, v) if local is None else local
        entering = forward.scan(local, initial, last=final, slots=slots)
        final = slots = None
    forward.run(q, k, v, out=out, state=entering, end=final, slots=slots)
    return entering if forward.plan.is_cut else None


def gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    forward: Walk,
    *,
    entering: torch.Tensor | None,
    d_out: torch.Tensor,
    d_final: torch.Tensor | None,
    into: tuple[torch.Tensor, ...],
    d_initial: torch.Tensor | None = None,
    local: torch.Tensor | None = None,
) -> None:
    """Write dq, dk and dv [T, H, *] into `into`, and the initial state's gradient.

    Args:
        q: [T, H, D].
        k: [T, H, D].
        v: [T, H, E].
        forward: The walk that made the outputs.
        entering: float32 [M, H, D, E], states that entered its segments, or None for zeros.
        d_out: [T, H, E].
        d_final: float32 [N, H, D, E], or None for zeros.
        into: dq, dk, dv.
        d_initial: float32 [N, H, D, E], written, or None.
        local: As in `attend`, of the backward walk over q and d_out.
    """
    dq, dk, dv = into
    slopes, cu_seqlens, plan = forward.slopes, forward.cu_seqlens, forward.plan
    swapped = Walk(slopes, cu_seqlens, plan, is_transposed=True)
    swapped.run(d_out, v, k, out=dq, state=entering)
    reverse = Walk(slopes, cu_seqlens, plan, backwards=True)
    adjoint = d_final
    if plan.is_cut:
        local = segment_states(reverse, q, d_out) if local is None else local
        adjoint = reverse.scan(local, d_final, last=d_initial)
        d_initial = None
    reverse.run(k, q, d_out, out=dv, state=adjoint, end=d_initial)
    swapped = Walk(slopes, cu_seqlens, plan, backwards=True, is_transposed=True)
    swapped.run(v, d_out, q, out=dk, state=adjoint)


def local_states(
    walk: Walk, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """States float32 [N, H, D, E] after sequences that start from zeros; adjoints, backwards.

    Args:
        walk: Forward, or backward with q for k and d_out for v.
        k: [T, H, D].
        v: [T, H, E].

    Returns:
        The states, and those of the segments alone [M, H, D, E] if the walk is cut.
    """
    if not walk.plan.is_cut:
        return segment_states(walk, k, v), None
    local = segment_states(walk, k, v)
    final = local.new_empty((walk.plan.num_sequences, *local.shape[1:]))
    walk.scan(local, None, last=final)
    return final, local


def segment_states(walk: Walk, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The state [M, H, D, E] of every segment alone; unused numbers stay unwritten and unread."""
    shape = (walk.plan.num_segments, k.shape[1], k.shape[-1], v.shape[-1])
    states = torch.empty(shape, dtype=torch.float32, device=k.device)
    walk.run(None, k, v, end=states)
    return states
