"""Decay rates of lightning attention."""

import torch


def lightning_slopes(
    num_heads: int, *, layer_index: int, num_layers: int, depth_epsilon: float = 0.0
) -> torch.Tensor:
    """Decay rate of every head of one layer.

    slope_h = 2^(-8h/H) * (1 - l/(L-1) + 1e-5), h counted from 1 (MiniMax-01 report, lightning
    attention; PAPER sec. 1).
    Early layers forget fast, the last layer hardly at all. A model of one layer takes l/(L-1) as 0.

    Args:
        num_heads: Heads H of the whole model, not of one tensor-parallel rank.
        layer_index: Global layer index l, from 0.
        num_layers: Layers L of the whole model.
        depth_epsilon: Added to L - 1; transformers' `minimax` model has 1e-5 there, which makes the
            last layer's rates larger (twice as large for L = 2).

    Returns:
        float32 [H], positive.
    """
    heads = torch.arange(1, num_heads + 1, dtype=torch.float64)
    depth = layer_index / (max(num_layers - 1, 1) + depth_epsilon)
    return (torch.exp2(-8.0 * heads / num_heads) * (1.0 - depth + 1e-5)).float()
