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
        chunk: Tokens per chunk.

    Returns:
        Outputs [T, H, E] in q's dtype; arithmetic in float32.
    """
    num_tokens = q.shape[0]
    num_chunks = -(-num_tokens // chunk)
    pad = num_chunks * chunk - num_tokens
    q_c, k_c, v_c = (_split_chunks(x, num_chunks, chunk, pad) for x in (q, k, v))  # [H, M, C, *]
    sequence = _sequence_of_token(cu_seqlens, num_chunks * chunk).view(num_chunks, chunk)

    i = torch.arange(chunk, device=q.device)
    distance = (i[:, None] - i[None, :]).float()
    decay = torch.exp(-slopes[:, None, None] * distance.clamp(min=0)) * (distance >= 0)  # [H, C, C]
    same = (sequence[:, :, None] == sequence[:, None, :]).float()  # [M, C, C]
    scores = (q_c @ k_c.transpose(-1, -2)) * decay[:, None] * same
    out = scores @ v_c
    if num_chunks == 1:
        return _join_chunks(out, num_tokens).to(q.dtype)

    in_last = (sequence == sequence[:, -1:]).float()  # token reaches the chunk's end
    k_weight = torch.exp(-slopes[:, None] * (chunk - 1 - i).float())[:, None] * in_last  # [H, M, C]
    local = (k_c * k_weight[..., None]).transpose(-1, -2) @ v_c  # K_n: [H, M, D, E]
    m = torch.arange(num_chunks, device=q.device)
    gap = (m[:, None] - 1 - m[None, :]).float()
    linked = (gap >= 0) & (sequence[:, :1] == sequence[:, -1])  # [M, M]
    carry = torch.exp(-slopes[:, None, None] * chunk * gap.clamp(min=0)) * linked  # [H, M, M]
    states = (carry @ local.flatten(2)).view_as(local)  # S_m
    in_first = (sequence == sequence[:, :1]).float()  # token continues what the chunk began with
    q_weight = torch.exp(-slopes[:, None] * (i + 1).float())[:, None] * in_first
    out = out + (q_c * q_weight[..., None]) @ states
    return _join_chunks(out, num_tokens).to(q.dtype)


def final_states(
    k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """State after the last token of every sequence: S = sum_t lam^(len-1-t) k_t^T v_t.

    Args:
        k: [T, H, D].
        v: [T, H, E].
        slopes: float32 [H].
        cu_seqlens: int [N + 1].

    Returns:
        float32 [N, H, D, E].
    """
    lengths = cu_seqlens.diff()
    position = torch.arange(k.shape[0], device=k.device)
    to_end = torch.repeat_interleave(cu_seqlens[1:], lengths) - 1 - position
    weighted = k.float() * torch.exp(-slopes[None] * to_end[:, None].float())[..., None]
    split = lengths.tolist()
    pairs = zip(torch.split(weighted, split), torch.split(v.float(), split), strict=True)
    return torch.stack([torch.einsum("thd,the->hde", a, b) for a, b in pairs])


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """One token for each of B sequences; updates `state` in place.

    Args:
        q: [B, H, D].
        k: [B, H, D].
        v: [B, H, E].
        slopes: float32 [H].
        state: float32 [B, H, D, E], overwritten with S_t.

    Returns:
        Outputs [B, H, E] in q's dtype.
    """
    state.mul_(torch.exp(-slopes)[None, :, None, None])
    state.addcmul_(k.float()[..., None], v.float()[:, :, None, :])
    return torch.matmul(q.float()[:, :, None, :], state)[:, :, 0].to(q.dtype)


def _split_chunks(x: torch.Tensor, num_chunks: int, chunk: int, pad: int) -> torch.Tensor:
    x = F.pad(x.float(), (0, 0, 0, 0, 0, pad)) if pad else x.float()
    return x.view(num_chunks, chunk, *x.shape[1:]).permute(2, 0, 1, 3)


def _join_chunks(x: torch.Tensor, num_tokens: int) -> torch.Tensor:
    return x.permute(1, 2, 0, 3).flatten(0, 1)[:num_tokens]


def _sequence_of_token(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    token = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, token, right=True)
