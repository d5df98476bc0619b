"""Experts of few tokens in Triton: five launches a layer, whatever the number of experts.

route   one program a token: logits in float32, the k largest, their softmax
group   one program an expert: which (token, choice) pairs are its own, in order
fc1     SiLU(gate) * up * weight for the pairs of an expert, gathered by that list
fc2     the same gathered rows by the second matrix
join    the sum over a token's choices

A tile of rows no pair fills ends at once, so a grid for the most pairs an expert could have costs
launches of empty programs and nothing is read on the host. Sums run in a fixed order, and a row's
do not depend on the others while `block_rows` stays the same.

Shapes: T tokens, h hidden, E experts of all ranks, L experts here, F width of an expert, k chosen,
P = T k pairs, pair t k + j being choice j of token t.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_COLUMNS = 64
_GROUP = 1024


def _tuning(rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Inner step, stages and warps by rows of a tile; measured on an H200 (`benchmarks/README.md`).

    Rows alone choose the inner step, so the order of sums, within a type.
    """
    if dtype == torch.float32:  # the others' stages would not fit in shared memory
        return {"INNER": 64}
    if rows < 64:
        return {"INNER": 128, "num_stages": 4, "num_warps": 4}
    return {"INNER": 64, "num_stages": 4, "num_warps": 8}


@dataclass(frozen=True)
class ExpertTable:
    """Where the weights of the experts of a layer lie; they are read in place.

    Attributes:
        fc1: int64 [L], addresses of [2 F, h] matrices, contiguous, gate then up.
        fc2: int64 [L], addresses of [h, F] matrices, contiguous.
        weights: The tensors themselves, which keeps them alive.
        width: F.
        first_expert: Number of the first expert here.
    """

    fc1: torch.Tensor
    fc2: torch.Tensor
    weights: tuple[list[torch.Tensor], list[torch.Tensor]]
    width: int
    first_expert: int

    @staticmethod
    def of(
        fc1: list[torch.Tensor], fc2: list[torch.Tensor], *, first_expert: int = 0
    ) -> "ExpertTable":
        """Make the table of tensors [2 F, h] and [h, F].

        Raises:
            ValueError: They are not contiguous, or of several shapes or dtypes.
        """
        for name, weights in (("fc1", fc1), ("fc2", fc2)):
            kinds = {(tuple(w.shape), w.dtype, w.is_contiguous()) for w in weights}
            if len(kinds) != 1 or not weights[0].is_contiguous():
                raise ValueError(
                    f"{name} has shapes, dtypes and contiguity {sorted(map(str, kinds))}, but must "
                    "be contiguous tensors of one shape and dtype"
                )
        pointers = [
            torch.tensor([w.data_ptr() for w in weights], device=weights[0].device)
            for weights in (fc1, fc2)
        ]
        return ExpertTable(pointers[0], pointers[1], (fc1, fc2), fc2[0].shape[1], first_expert)


def routed_experts(
    x: torch.Tensor,
    router: torch.Tensor,
    table: ExpertTable,
    *,
    top_k: int,
    block_rows: int | None = None,
    chosen: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over the chosen experts e of w_e fc2_e [SiLU(gate_e x) * up_e x].

    w: softmax over the float32 logits of the k chosen. Experts of other ranks add nothing.

    Args:
        x: [T, h], of the weights' dtype, contiguous.
        router: [E, h], any float dtype.
        table: The experts here.
        top_k: k.
        block_rows: Rows of a tile, a power of two from 16; None chooses by T. A fixed one makes the
            bits of a row independent of the others.
        chosen: int32 [T, k], contiguous; gets the experts of each token, the best first.

    Returns:
        [T, h] in x's dtype.
    """
    num_tokens, hidden = x.shape
    num_experts, num_pairs = router.shape[0], num_tokens * top_k
    num_local, width = table.fc1.shape[0], table.width
    new = x.new_empty
    if chosen is None:
        chosen = new(num_tokens, top_k, dtype=torch.int32)
    share = new(num_pairs, dtype=torch.float32)
    members = new(num_local, num_pairs, dtype=torch.int32)
    counts = new(num_local, dtype=torch.int32)
    inner, parts = new(num_pairs, width), new(num_pairs, hidden, dtype=torch.float32)
    out = torch.empty_like(x)
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    rows = block_rows or min(64, max(16, triton.next_power_of_2(num_tokens)))
    tuning = _tuning(rows, x.dtype)
    # A token chooses an expert once, so no expert has more pairs than there are tokens.
    tiles = triton.cdiv(num_tokens, rows)
    _route_kernel[(num_tokens,)](
        x, router, chosen, share,
        HIDDEN=hidden, EXPERTS=num_experts, TOP=top_k,
        ROWS=triton.next_power_of_2(num_experts), BLOCK=128,
    )  # fmt: skip
    _group_kernel[(num_local,)](
        chosen, members, counts, num_pairs, table.first_expert,
        BLOCK=min(_GROUP, triton.next_power_of_2(num_pairs)),
    )  # fmt: skip
    _fc1_kernel[(tiles, triton.cdiv(width, _COLUMNS), num_local)](
        x, table.fc1, inner, members, counts, share, num_pairs,
        HIDDEN=hidden, WIDTH=width, TOP=top_k,
        ROWS=rows, COLUMNS=_COLUMNS, PRECISION=precision, **tuning,
    )  # fmt: skip
    _fc2_kernel[(tiles, triton.cdiv(hidden, _COLUMNS), num_local)](
        inner, table.fc2, parts, members, counts, num_pairs,
        HIDDEN=hidden, WIDTH=width,
        ROWS=rows, COLUMNS=_COLUMNS, PRECISION=precision, **tuning,
    )  # fmt: skip
    _join_kernel[(num_tokens, triton.cdiv(hidden, 1024))](
        parts, chosen, out, table.first_expert, num_local, HIDDEN=hidden, TOP=top_k, BLOCK=1024
    )
    return out


@triton.jit
def _route_kernel(
    x, router, chosen, share,
    HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, TOP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, HIDDEN, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < HIDDEN
        value = tl.load(x + token * HIDDEN + column, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(
            router + expert[:, None] * HIDDEN + column[None, :],
            mask=(expert[:, None] < EXPERTS) & inside[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        acc += weight * value[None, :]
    logit = tl.where(expert < EXPERTS, tl.sum(acc, 1), float("-inf"))
    top = tl.max(logit, 0)
    total = top * 0.0
    left = logit
    for _ in tl.static_range(TOP):
        best = tl.argmax(left, 0)
        total += tl.exp(tl.max(left, 0) - top)
        left = tl.where(expert == best, float("-inf"), left)
    left = logit
    for choice in tl.static_range(TOP):
        best = tl.argmax(left, 0)
        tl.store(chosen + token * TOP + choice, best.to(tl.int32))
        tl.store(share + token * TOP + choice, tl.exp(tl.max(left, 0) - top) / total)
        left = tl.where(expert == best, float("-inf"), left)


@triton.jit
def _group_kernel(chosen, members, counts, num_pairs, first_expert, BLOCK: tl.constexpr):
    local = tl.program_id(0)
    count = 0
    for start in range(0, num_pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        expert = tl.load(chosen + pair, mask=pair < num_pairs, other=-1)
        own = (expert == local + first_expert).to(tl.int32)
        place = count + tl.cumsum(own, 0) - own
        tl.store(members + local * num_pairs + place, pair, mask=own > 0)
        count += tl.sum(own, 0)
    tl.store(counts + local, count)


@triton.jit
def _fc1_kernel(
    x, addresses, inner, members, counts, share, num_pairs,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, TOP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    local = tl.program_id(2)
    first = tl.program_id(0) * ROWS
    count = tl.load(counts + local)
    if first < count:
        place = first + tl.arange(0, ROWS)
        filled = place < count
        pair = tl.load(members + local * num_pairs + place, mask=filled, other=0).to(tl.int64)
        token = pair // TOP
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        in_width = column < WIDTH
        weight = tl.load(addresses + local).to(tl.pointer_type(x.dtype.element_ty))
        weight = tl.multiple_of(weight, 16)
        gate = tl.zeros([ROWS, COLUMNS], tl.float32)
        up = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, HIDDEN, INNER):
            k = start + tl.arange(0, INNER)
            inside = k < HIDDEN
            left = tl.load(
                x + token[:, None] * HIDDEN + k[None, :],
                mask=filled[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            where = weight + column[:, None].to(tl.int64) * HIDDEN + k[None, :]
            mask = in_width[:, None] & inside[None, :]
            gate_part = tl.load(where, mask=mask, other=0.0)
            up_part = tl.load(where + WIDTH * HIDDEN, mask=mask, other=0.0)
            gate = tl.dot(left, tl.trans(gate_part), gate, input_precision=PRECISION)
            up = tl.dot(left, tl.trans(up_part), up, input_precision=PRECISION)
        # The products are rounded as the trainer's are, before the activation.
        gate = gate.to(inner.dtype.element_ty).to(tl.float32)
        up = up.to(inner.dtype.element_ty).to(tl.float32)
        own = tl.load(share + pair, mask=filled, other=0.0)
        result = gate * tl.sigmoid(gate) * up * own[:, None]
        tl.store(
            inner + pair[:, None] * WIDTH + column[None, :], result.to(inner.dtype.element_ty),
            mask=filled[:, None] & in_width[None, :],
        )  # fmt: skip


@triton.jit
def _fc2_kernel(
    inner, addresses, parts, members, counts, num_pairs,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    local = tl.program_id(2)
    first = tl.program_id(0) * ROWS
    count = tl.load(counts + local)
    if first < count:
        place = first + tl.arange(0, ROWS)
        filled = place < count
        pair = tl.load(members + local * num_pairs + place, mask=filled, other=0).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        in_hidden = column < HIDDEN
        weight = tl.load(addresses + local).to(tl.pointer_type(inner.dtype.element_ty))
        weight = tl.multiple_of(weight, 16)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, WIDTH, INNER):
            k = start + tl.arange(0, INNER)
            inside = k < WIDTH
            left = tl.load(
                inner + pair[:, None] * WIDTH + k[None, :],
                mask=filled[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            right = tl.load(
                weight + column[:, None].to(tl.int64) * WIDTH + k[None, :],
                mask=in_hidden[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
        tl.store(
            parts + pair[:, None] * HIDDEN + column[None, :], total,
            mask=filled[:, None] & in_hidden[None, :],
        )  # fmt: skip


@triton.jit
def _join_kernel(
    parts, chosen, out, first_expert, num_local,
    HIDDEN: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < HIDDEN
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOP):
        pair = token * TOP + choice
        local = tl.load(chosen + pair) - first_expert
        is_here = (local >= 0) & (local < num_local)
        total += tl.load(parts + pair * HIDDEN + column, mask=inside & is_here, other=0.0)
    tl.store(out + token * HIDDEN + column, total.to(out.dtype.element_ty), mask=inside)
