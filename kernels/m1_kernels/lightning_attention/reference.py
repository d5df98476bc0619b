"""Lightning attention in plain torch: the shortest definition, and the chunked form for CPUs.

Shapes: T tokens, N sequences, H heads, D key dims, E value dims, C tokens per chunk, M chunks.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F


def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, one token at a time in float64.

    S_t = exp(-slope) S_{t-1} + k_t^T v_t;  o_t = q_t S_t.

    Args:
        q: [T, H, D].
        k: [T, H, D].
        v: [T, H, E].
        slopes: [H], positive decay rates.
        cu_seqlens: int [N + 1], bounds of the packed sequences.
        initial_state: [N, H, D, E], or None for zeros.

    Returns:
        Outputs [T, H, E] and final states [N, H, D, E], float64.
    """
    q, k, v, slopes = q.double(), k.double(), v.double(), slopes.double()
    decay = torch.exp(-slopes)[:, None, None]
    bounds = cu_seqlens.tolist()
    outputs, finals = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        if initial_state is None:
            state = q.new_zeros(q.shape[1], q.shape[2], v.shape[2])
        else:
            state = initial_state[n].double()
        for t in range(start, end):
            state = decay * state + k[t, :, :, None] * v[t, :, None, :]
            outputs.append(torch.einsum("hd,hde->he", q[t], state))
        finals.append(state)
    return torch.stack(outputs), torch.stack(finals)


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    *,
    chunk: int = 32,
) -> torch.Tensor:
    """The same outputs by chunks, without a loop, differentiable by autograd.

    Inside a chunk the quadratic form with the decay mask; between chunks the states, which obey a
    linear recurrence of their own and are summed by one small lower-triangular matrix:

        o_i = sum_{j <= i in chunk} lam^(i-j) (q_i k_j) v_j + lam^(i+1) q_i S_m,
        S_m = sum_{n < m} lam^(C(m-1-n)) K_n,
        K_n = sum_{j in chunk n} lam^(C-1-j) k_j^T v_j.

    Terms that cross a sequence bound are masked. Every exponent is non-positive, so nothing
    overflows.

    Args:
        q: [T, H, D].
        k: [T, H, D].
        v: [T, H, E].
        slopes: float32 [H].
        cu_seqlens: int [N + 1].
        initial_state: [N, H, D, E], or None for zeros.
        chunk: Tokens per chunk.

    Returns:
        Outputs [T, H, E] in q's dtype; arithmetic in float32, of float64 inputs in float64.
    """
    out = _chunked(q, k, v, slopes.to(_arithmetic(q)), cu_seqlens, chunk)
    if initial_state is not None:
        out = out + carried(q, slopes, cu_seqlens, initial_state)
    return out.to(q.dtype)


def chunked_apart(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None = None,
) -> torch.Tensor:
    """`chunked`, one sequence after the other, so that none changes the bits of another.

    Args:
        q: [T, H, D].
        k: [T, H, D].
        v: [T, H, E].
        slopes: float32 [H].
        cu_seqlens: int [N + 1].
        initial_state: [N, H, D, E], or None for zeros.

    Returns:
        Outputs [T, H, E] in q's dtype.
    """
    outputs = []
    for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        state = None if initial_state is None else initial_state[n : n + 1]
        rows = slice(start, end)
        alone = cu_seqlens.new_tensor([0, end - start])
        outputs.append(chunked(q[rows], k[rows], v[rows], slopes, alone, state))
    return torch.cat(outputs)


def carried(
    q: torch.Tensor, slopes: torch.Tensor, cu_seqlens: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """What the states that enter the sequences add to the outputs: lam^(i+1) q_i S.

    Args:
        q: [T, H, D].
        slopes: float32 [H].
        cu_seqlens: int [N + 1].
        state: [N, H, D, E].

    Returns:
        [T, H, E] in float32, of float64 q in float64.
    """
    arithmetic, lengths = _arithmetic(q), cu_seqlens.diff()
    starts = torch.repeat_interleave(cu_seqlens[:-1], lengths)
    position = torch.arange(q.shape[0], device=q.device) - starts
    weight = torch.exp(-slopes[None].to(arithmetic) * (position[:, None] + 1))  # [T, H]
    parts = torch.split(q.to(arithmetic) * weight[..., None], lengths.tolist())
    pairs = zip(parts, state.to(arithmetic), strict=True)
    return torch.cat([torch.einsum("thd,hde->the", rows, entering) for rows, entering in pairs])


def _arithmetic(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    chunk: int,
) -> torch.Tensor:
    num_tokens = q.shape[0]
    num_chunks = -(-num_tokens // chunk)
    pad = num_chunks * chunk - num_tokens
    q_c, k_c, v_c = (_split_chunks(x, num_chunks, chunk, pad) for x in (q, k, v))  # [H, M, C, *]
    sequence = _sequence_of_token(cu_seqlens, num_chunks * chunk).view(num_chunks, chunk)

    i = torch.arange(chunk, device=q.device)
    distance = (i[:, None] - i[None, :]).to(slopes.dtype)
    decay = torch.exp(-slopes[:, None, None] * distance.clamp(min=0)) * (distance >= 0)  # [H, C, C]
    same = (sequence[:, :, None] == sequence[:, None, :]).to(slopes.dtype)  # [M, C, C]
    scores = (q_c @ k_c.transpose(-1, -2)) * decay[:, None] * same
    out = scores @ v_c
    if num_chunks == 1:
        return _join_chunks(out, num_tokens)

    in_last = (sequence == sequence[:, -1:]).to(slopes.dtype)  # token reaches the chunk's end
    k_weight = torch.exp(-slopes[:, None] * (chunk - 1 - i))[:, None] * in_last  # [H, M, C]
    local = (k_c * k_weight[..., None]).transpose(-1, -2) @ v_c  # K_n: [H, M, D, E]
    m = torch.arange(num_chunks, device=q.device)
    gap = (m[:, None] - 1 - m[None, :]).to(slopes.dtype)
    linked = (gap >= 0) & (sequence[:, :1] == sequence[:, -1])  # [M, M]
    carry = torch.exp(-slopes[:, None, None] * chunk * gap.clamp(min=0)) * linked  # [H, M, M]
    states = (carry @ local.flatten(2)).view_as(local)  # S_m
    in_first = (sequence == sequence[:, :1]).to(
        slopes.dtype
    )  # token continues what the chunk began with
    q_weight = torch.exp(-slopes[:, None] * (i + 1))[:, None] * in_first
    out = out + (q_c * q_weight[..., None]) @ states
    return _join_chunks(out, num_tokens)


def final_states(
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None = None,
) -> torch.Tensor:
    """State after every sequence's last token: S = lam^len S_0 + sum_t lam^(len-1-t) k_t^T v_t.

    Args:
        k: [T, H, D].
        v: [T, H, E].
        slopes: float32 [H].
        cu_seqlens: int [N + 1].
        initial_state: [N, H, D, E], or None for zeros.

    Returns:
        float32 [N, H, D, E], of float64 inputs in float64.
    """
    lengths, arithmetic = cu_seqlens.diff(), _arithmetic(k)
    slopes = slopes.to(arithmetic)
    position = torch.arange(k.shape[0], device=k.device)
    to_end = torch.repeat_interleave(cu_seqlens[1:], lengths) - 1 - position
    weighted = k.to(arithmetic) * torch.exp(-slopes[None] * to_end[:, None])[..., None]
    split = lengths.tolist()
    pairs = zip(torch.split(weighted, split), torch.split(v.to(arithmetic), split), strict=True)
    final = torch.stack([torch.einsum("thd,the->hde", a, b) for a, b in pairs])
    if initial_state is None:
        return final
    return final + torch.exp(-slopes[None] * lengths[:, None])[..., None, None] * initial_state


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """S tokens for each of B rows; updates the rows' places in a table of states in place.

    Args:
        q: [B, S, H, D].
        k: [B, S, H, D].
        v: [B, S, H, E].
        slopes: float32 [H].
        states: float32 [slots, H, D, E].
        slots: int [B], negative for rows that are left out and give zeros; None: row b has slot b.

    Returns:
        Outputs [B, S, H, E] in q's dtype.
    """
    if slots is not None:
        used = (slots >= 0).nonzero()[:, 0]
        place = slots[used].long()
        chosen = states[place]
        out = torch.zeros_like(v)
        out[used] = step(q[used], k[used], v[used], slopes, chosen)
        states[place] = chosen
        return out
    keep, lost = (x[None, :, None, None] for x in decay_parts(slopes))
    outputs = []
    for q_t, k_t, v_t in zip(*(x.float().unbind(1) for x in (q, k, v)), strict=True):
        change = (lost * states).addcmul_(k_t[..., None], v_t[:, :, None, :])
        states.mul_(keep).add_(change)
        outputs.append((q_t[..., None] * states).sum(2))  # faster than many small products
    return torch.stack(outputs, dim=1).to(q.dtype)


def decay_parts(slopes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`keep` and `lost`, whose sum is exp(-slope) more exactly than one float32 says it.

    A decay near one is rounded by up to 6e-8, the same way for every token: over 64K tokens 1e-3
    of the slowest state of the published model's last layer, whose slope is 4e-8.

    Args:
        slopes: float32 [H].

    Returns:
        Two of float32 [H]: 1 and expm1(-slope) for slopes below 1/2, else exp(-slope) and 0.
    """
    is_near = slopes < 0.5
    lost = torch.where(is_near, torch.expm1(-slopes.double()), 0.0)
    return torch.where(is_near, 1.0, torch.exp(-slopes)), lost.float()


def _split_chunks(x: torch.Tensor, num_chunks: int, chunk: int, pad: int) -> torch.Tensor:
    x = x.to(_arithmetic(x))
    x = F.pad(x, (0, 0, 0, 0, 0, pad)) if pad else x
    return x.view(num_chunks, chunk, *x.shape[1:]).permute(2, 0, 1, 3)


def _join_chunks(x: torch.Tensor, num_tokens: int) -> torch.Tensor:
    return x.permute(1, 2, 0, 3).flatten(0, 1)[:num_tokens]


def _sequence_of_token(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    token = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, token, right=True)
