"""The definition: each token by the experts it chose, one token at a time, in float64.

Shapes: T tokens, h hidden, E experts of all ranks, L experts here, F width of an expert, k chosen.
"""

import torch
import torch.nn.functional as F


def routed_experts(
    x: torch.Tensor,
    router: torch.Tensor,
    fc1: list[torch.Tensor],
    fc2: list[torch.Tensor],
    *,
    top_k: int,
    first_expert: int = 0,
) -> torch.Tensor:
    """Sum over the chosen experts e of w_e fc2_e [SiLU(gate_e x) * up_e x].

    w: softmax over the logits of the k chosen. Experts of other ranks add nothing.

    Args:
        x: [T, h].
        router: [E, h].
        fc1: L of [2 F, h], gate then up.
        fc2: L of [h, F].
        top_k: k.
        first_expert: Number of the first one here.

    Returns:
        float64 [T, h].
    """
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for row, token in enumerate(x.double()):
        top, chosen = (router.double() @ token).topk(top_k)
        for weight, number in zip(top.softmax(-1), chosen.tolist(), strict=True):
            local = number - first_expert
            if 0 <= local < len(fc1):
                gate, up = (fc1[local].double() @ token).chunk(2)
                out[row] += weight * (fc2[local].double() @ (F.silu(gate) * up))
    return out
