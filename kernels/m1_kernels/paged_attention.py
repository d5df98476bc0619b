"""Softmax attention of one query a sequence over pages of keys and values, on a GPU.

The keys of a sequence are cut into splits of a fixed number of tokens, each a program of its own,
whose results are joined (flash decoding: Dao et al., 2023). A sequence's splits depend on its own
length alone, so its bits do not depend on the batch, and nothing is read on the host.

Shapes: B sequences, H heads, KV key-value heads, D head dim (a power of two, at least 16), P pages
of G tokens, n pages of a row of the table.
"""

import torch
import triton
import triton.language as tl

SPLIT = 1024
_BLOCK = 64


def paged_attention_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v over the first `lengths` tokens of each sequence.

    Args:
        q: [B, H, D].
        keys: [P, G, KV, D], contiguous.
        values: [P, G, KV, D], contiguous.
        pages: int64 [B, n], a sequence's pages in order, rows of any stride; -1 is the last page,
            P - 1.
        lengths: int64 [B], at least 1.

    Returns:
        [B, H, D] in q's dtype.

    Raises:
        ValueError: D is no power of two of at least 16.
    """
    batch, heads, dim = q.shape
    num_pages, page_size, groups = keys.shape[:3]
    if dim < 16 or dim & (dim - 1):
        raise ValueError(f"head dim is {dim}, but must be a power of two of at least 16")
    num_splits = triton.cdiv(pages.shape[1] * page_size, SPLIT)
    q, lengths = q.contiguous(), lengths.contiguous()
    pages = pages if pages.stride(1) == 1 else pages.contiguous()
    partial = torch.empty(batch, heads, num_splits, dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(batch, heads, num_splits, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    group = heads // groups
    _split_kernel[(batch, groups, num_splits)](
        q, keys, values, pages, lengths, partial, sums, dim**-0.5,
        pages.stride(0), num_pages, num_splits,
        HEADS=heads, GROUPS=groups, DIM=dim, PAGE=page_size, GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)), BLOCK=_BLOCK, LENGTH=SPLIT,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    _join_kernel[(batch, heads)](
        partial, sums, lengths, out, num_splits, HEADS=heads, DIM=dim, LENGTH=SPLIT
    )
    return out


@triton.jit
def _split_kernel(
    q, keys, values, pages, lengths, partial, sums, scale,
    row_stride, num_pages, num_splits,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LENGTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    start = split * LENGTH
    if start < length:
        end = tl.minimum(start + LENGTH, length)
        heads = tl.arange(0, ROWS)
        dims = tl.arange(0, DIM)
        own = (row * HEADS + group * GROUP + heads).to(tl.int64)
        is_head = heads < GROUP
        query = tl.load(q + own[:, None] * DIM + dims[None, :], mask=is_head[:, None], other=0.0)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM], tl.float32)
        for first in range(start, end, BLOCK):
            token = first + tl.arange(0, BLOCK)
            is_token = token < end
            page = tl.load(pages + row * row_stride + token // PAGE, mask=is_token, other=0)
            page = tl.where(page < 0, num_pages - 1, page).to(tl.int64)
            place = ((page * PAGE + token % PAGE) * GROUPS + group) * DIM
            where = place[:, None] + dims[None, :]
            key = tl.load(keys + where, mask=is_token[:, None], other=0.0)
            score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
            score = tl.where(is_token[None, :], score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp(score - new_top[:, None])
            fade = tl.exp(top - new_top)
            total = total * fade + tl.sum(weight, 1)
            value = tl.load(values + where, mask=is_token[:, None], other=0.0)
            part = tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
            acc = acc * fade[:, None] + part
            top = new_top
        slot = own * num_splits + split
        tl.store(
            partial + slot[:, None] * DIM + dims[None, :], acc / total[:, None],
            mask=is_head[:, None],
        )  # fmt: skip
        tl.store(sums + slot, top + tl.log(total), mask=is_head)


@triton.jit
def _join_kernel(
    partial, sums, lengths, out, num_splits,
    HEADS: tl.constexpr, DIM: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row).to(tl.int32)
    dims = tl.arange(0, DIM)
    own = (row * HEADS + head).to(tl.int64)
    base = own * num_splits
    top = tl.load(sums + base)
    total = top * 0.0 + 1.0
    acc = tl.load(partial + base * DIM + dims)
    for split in range(1, tl.cdiv(length, LENGTH)):
        found = tl.load(sums + base + split)
        new_top = tl.maximum(top, found)
        fade, weight = tl.exp(top - new_top), tl.exp(found - new_top)
        acc = acc * fade + weight * tl.load(partial + (base + split) * DIM + dims)
        total = total * fade + weight
        top = new_top
    result = acc / total
    tl.store(out + own * DIM + dims, result.to(out.dtype.element_ty))
