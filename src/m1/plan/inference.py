"""FLOPs to generate n tokens, against DeepSeek-R1 and Qwen3-235B-A22B (M1 paper, Fig. 1 right).

    F(n) = 2 A n + L H 2 (d_score + d_value) P(n) + n F_lightning

A active parameters, L softmax layers, H query heads, P pairs of tokens that attend. The paper
claims about 25% of R1's FLOPs at 100K tokens and under 50% at 64K, and names no convention. Two
are computed, K being 1000:

- `full`: P = n^2, R1's heads taken as plain attention of 128 dims: M1 takes 34.3% of R1's FLOPs at
  64K and 26.4% at 100K, which is the paper's claim.
- `causal`: P = n^2 / 2, R1's own dims (scores 192, values 128): 43.9% at 64K, 33.5% at 100K.

Neither counts what R1's latent attention costs when its projections are absorbed while decoding
(scores of 576 dims, values of 512), nor memory traffic, which bounds decoding on real GPUs.
"""

from dataclasses import dataclass
from typing import Literal

from m1.config.model_tables import ModelConfig
from m1.plan.flops import lightning_flops
from m1.plan.parameters import count_parameters

Convention = Literal["full", "causal"]
CONVENTIONS: dict[Convention, str] = {
    "full": "full n^2, R1 as plain attention of 128 dims",
    "causal": "causal n^2/2, R1's own dims (scores 192, values 128)",
}
LENGTHS = (16_000, 32_000, 64_000, 100_000, 128_000)
"""Generated tokens; K is 1000."""


@dataclass(frozen=True)
class Architecture:
    """What decides a model's FLOPs in decoding."""

    name: str
    active_parameters: int
    softmax_layers: int
    num_heads: int
    head_dim: int
    """Dims of the values."""
    score_dim: int
    """Dims of queries and keys."""
    lightning_flops: int = 0
    """Of one token, over all lightning layers in recurrent form."""


DEEPSEEK_R1 = Architecture(
    # DeepSeek-V3 report (arXiv 2412.19437, sec. 4.2), whose architecture R1 has: 671B parameters,
    # 37B active, 61 layers, 128 heads; keys of 128 dims without and 64 with RoPE, values of 128.
    name="DeepSeek-R1",
    active_parameters=37_000_000_000,
    softmax_layers=61,
    num_heads=128,
    head_dim=128,
    score_dim=128 + 64,
)
QWEN3_235B = Architecture(
    # Qwen3 report (arXiv 2505.09388, sec. 2, table of MoE models): 235B parameters, 22B active, 94
    # layers, 64 query heads; head dim 128 from the published configuration.
    name="Qwen3-235B-A22B",
    active_parameters=22_000_000_000,
    softmax_layers=94,
    num_heads=64,
    head_dim=128,
    score_dim=128,
)


@dataclass(frozen=True)
class Generation:
    """FLOPs of generating `length` tokens, model by model; the recipe's comes first."""

    length: int
    flops: dict[str, float]
    share_of_r1: dict[str, float]
    """FLOPs as a fraction of DeepSeek-R1's."""


def architecture_of(model: ModelConfig, name: str) -> Architecture:
    """The recipe's model; active parameters without embedding and head, as the paper counts."""
    softmax_layers = model.layer_kinds.count("softmax")
    per_layer = lightning_flops(model, "recurrent", 1)
    return Architecture(
        name=name,
        active_parameters=count_parameters(model, vocab_size=0).active,
        softmax_layers=softmax_layers,
        num_heads=model.num_heads,
        head_dim=model.head_dim,
        score_dim=model.head_dim,
        lightning_flops=(model.num_layers - softmax_layers) * per_layer,
    )


def generation_flops(model: Architecture, num_tokens: int, convention: Convention) -> float:
    """FLOPs of generating `num_tokens` after an empty prompt."""
    is_causal = convention == "causal"
    pairs = num_tokens**2 / (2 if is_causal else 1)
    score_dim = model.score_dim if is_causal else model.head_dim
    pair_flops = 2 * model.num_heads * (score_dim + model.head_dim)
    per_token = 2 * model.active_parameters + model.lightning_flops
    return num_tokens * per_token + model.softmax_layers * pair_flops * pairs


def compare(model: ModelConfig, name: str, convention: Convention) -> list[Generation]:
    """The recipe's model against R1 and Qwen3 at `LENGTHS`."""
    models = (architecture_of(model, name), DEEPSEEK_R1, QWEN3_235B)
    rows = []
    for length in LENGTHS:
        flops = {x.name: generation_flops(x, length, convention) for x in models}
        shares = {key: value / flops[DEEPSEEK_R1.name] for key, value in flops.items()}
        rows.append(Generation(length, flops, shares))
    return rows
