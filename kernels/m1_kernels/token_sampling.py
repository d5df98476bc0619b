"""Sampling a token a row from logits on a GPU: one program a row instead of a dozen launches.

Three passes over a row, which stays in the cache: the maximum; the sums of the softmax before
temperature (for log-probability and entropy) and after it; the token at which the running sum
passes u times the whole. Blocks are added in float64 in a fixed order, so a row's result does not
depend on the others.

Shapes: B rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 2048


def sample_tokens(
    logits: torch.Tensor, uniform: torch.Tensor, temperatures: torch.Tensor, *, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Invert the cumulative distribution of softmax(logits / temperature) at u.

    Args:
        logits: float32 [B, V], rows of any stride.
        uniform: float64 [B] in [0, 1).
        temperatures: float32 [B]; 0 takes the likeliest.
        num_tokens: Only ids below it are tokens; the rest pads the embedding and is never chosen.

    Returns:
        Tokens int64 [B]; float32 [B]: their log-probabilities before temperature, over all V; after
        it (0 where greedy); entropies in nats before it.
    """
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    count, device = logits.shape[0], logits.device
    tokens = torch.empty(count, dtype=torch.int64, device=device)
    logprobs, sampling, entropies = torch.empty(3, count, device=device).unbind(0)
    if count:
        _kernel[(count,)](
            logits, uniform, temperatures, tokens, logprobs, sampling, entropies,
            logits.stride(0), num_tokens, V=logits.shape[1], BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return tokens, logprobs, sampling, entropies


@triton.jit
def _kernel(
    logits, uniform, temperatures, tokens, logprobs, sampling, entropies,
    stride, num_tokens, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    given = tl.load(temperatures + row)
    greedy = given == 0
    warmth = tl.where(greedy, 1.0, 1.0 / tl.where(greedy, 1.0, given))
    lane = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    likeliest = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        column = start + lane
        value = tl.load(base + column, mask=column < V, other=float("-inf"))
        highest = tl.maximum(highest, value)
        real = tl.where(column < num_tokens, value, float("-inf"))
        where = tl.where(real > likeliest, column, where)
        likeliest = tl.maximum(likeliest, real)
    peak, best = tl.max(highest, 0), tl.max(likeliest, 0)
    argmax = tl.min(tl.where(likeliest == best, where, V), 0)

    mass = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([], tl.float64)
    for start in range(0, V, BLOCK):
        column = start + lane
        value = tl.load(base + column, mask=column < V, other=float("-inf"))
        gap = value - peak
        part = tl.exp(gap)
        mass += part
        moment += tl.where(part > 0, part * gap, 0.0)
        weight = tl.where(column < num_tokens, tl.exp((value - best) * warmth), 0.0)
        total += tl.sum(weight, 0).to(tl.float64)
    partition = tl.sum(mass, 0)
    entropy = tl.log(partition) - tl.sum(moment, 0) / partition

    threshold = tl.load(uniform + row) * total
    before = tl.zeros([], tl.float64)
    token = tl.full([], -1, tl.int32)
    last = tl.full([], 0, tl.int32)
    for start in range(0, V, BLOCK):
        if token < 0:
            column = start + lane
            value = tl.load(base + column, mask=column < V, other=float("-inf"))
            weight = tl.where(column < num_tokens, tl.exp((value - best) * warmth), 0.0)
            size = tl.sum(weight, 0).to(tl.float64)
            last = tl.maximum(last, tl.max(tl.where(weight > 0, column, 0), 0))
            if before + size > threshold:
                reached = before + tl.cumsum(weight, 0).to(tl.float64) > threshold
                first = tl.min(tl.where(reached & (weight > 0), column, V), 0)
                token = tl.where(first < V, first, last).to(tl.int32)
            before += size
    token = tl.where(token < 0, last, token)  # what rounding left over
    token = tl.where(greedy, argmax, token)
    chosen = tl.load(base + token)
    drawn = (chosen - best) * warmth - tl.log(total.to(tl.float32))
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, chosen - peak - tl.log(partition))
    tl.store(sampling + row, tl.where(greedy, 0.0, drawn))
    tl.store(entropies + row, entropy)
