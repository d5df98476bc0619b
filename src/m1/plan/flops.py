"""FLOPs of one token: matrix products only, two FLOPs to a multiply-add.

Letters: n tokens of the sequence, H heads, D head dim, C tokens of a chunk. A product of a token
with a matrix of N entries takes 2N; the backward pass takes twice the forward one (Kaplan et al.
2020, arXiv 2001.08361, sec. 2.1). Not counted: norms, activations, RoPE, the routing of tokens,
the optimizer, and what recomputation adds ("model FLOPs" of Korthikanti et al. 2022, arXiv
2205.05198).
"""

from dataclasses import dataclass
from typing import Literal

from m1.config.model_tables import ModelConfig
from m1.plan.parameters import layer_groups

Mask = Literal["causal", "full"]
"""How softmax attention is charged: each token for the n/2 positions that it sees on average, or
for all n as `torch.utils.flop_counter` does."""
LightningForm = Literal["chunked", "recurrent"]
"""How lightning attention is computed: by chunks in training, token by token in decoding."""

CHUNK_TOKENS = 64
"""Chunk of the GPU kernel; the CPU's takes 32."""
BACKWARD = 2
"""FLOPs of the backward pass, in forward passes."""


@dataclass(frozen=True)
class TokenFlops:
    """Forward FLOPs of one token in a sequence, over all layers."""

    projections: int
    """Attention's projections, router, experts or MLP."""
    softmax_attention: int
    """Scores and their product with the values."""
    lightning_attention: int
    """Products with keys, values and states."""
    head: int
    """Logits."""

    @property
    def forward(self) -> int:
        """Forward pass."""
        return self.projections + self.softmax_attention + self.lightning_attention + self.head

    @property
    def training(self) -> int:
        """Forward and backward pass."""
        return (1 + BACKWARD) * self.forward


def token_flops(
    model: ModelConfig,
    vocab_size: int,
    *,
    sequence_length: int,
    mask: Mask = "causal",
    form: LightningForm = "chunked",
    chunk_tokens: int = CHUNK_TOKENS,
) -> TokenFlops:
    """Forward FLOPs of one token, the mean over a sequence of `sequence_length` tokens.

    The CPU's chunked form carries states over M chunks by a further [M, M] product, 2 M D^2 / C a
    head and token, which is not counted here: no kernel that runs at scale does so.
    """
    num_softmax = model.layer_kinds.count("softmax")
    num_lightning = model.num_layers - num_softmax
    return TokenFlops(
        projections=sum(
            2 * group.active
            for kind in model.layer_kinds
            for group in layer_groups(model, kind)
            if group.is_matmul
        ),
        softmax_attention=num_softmax * softmax_flops(model, sequence_length, mask),
        lightning_attention=num_lightning * lightning_flops(model, form, chunk_tokens),
        head=2 * vocab_size * model.hidden_size,
    )


def softmax_flops(model: ModelConfig, sequence_length: int, mask: Mask) -> int:
    """One softmax layer and token: 4 n H D in full (scores 2nHD, values 2nHD), half when causal.

    FlashAttention-2 (arXiv 2307.08691, sec. 4.1) counts the same two products and the same half.
    """
    full = 4 * sequence_length * model.num_heads * model.head_dim
    return full if mask == "full" else full // 2


def lightning_flops(model: ModelConfig, form: LightningForm, chunk_tokens: int) -> int:
    """One lightning layer and token (MiniMax-01 report: intra- and inter-chunk parts).

    Recurrent: state update 2 H D^2 and read 2 H D^2. Chunked: the same for each token, and the
    whole C x C block of scores inside the chunk, 2 C H D for them and 2 C H D for the values.
    """
    heads, dim = model.num_heads, model.head_dim
    states = 4 * heads * dim * dim
    return states if form == "recurrent" else states + 4 * chunk_tokens * heads * dim
