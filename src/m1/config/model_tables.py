"""Tables of the model: the hybrid architecture and its mixture of experts."""

from typing import Literal, Self

from pydantic import model_validator

from m1.config.base import (
    Config,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    refuse,
)


class MoeConfig(Config):
    """Mixture of experts in every layer: softmax, top-k, renormalise (paper: 32 experts, top-2)."""

    num_experts: PositiveInt
    """Experts per layer."""
    top_k: PositiveInt = 2
    """Experts per token, at least 2 unless there is a single expert."""
    ffn_hidden_size: PositiveInt
    """Width of one expert's SwiGLU."""
    shared_ffn_hidden_size: NonNegativeInt = 0
    """Width of a shared expert; 0 for none."""
    aux_loss_coefficient: NonNegativeFloat = 0.01
    """Load-balancing loss (Text-01: 0.01; M1 lowers it)."""

    @model_validator(mode="after")
    def _top_k_fits(self) -> Self:
        texts = []
        if self.top_k > self.num_experts:
            texts.append(
                f"top_k is {self.top_k}, but num_experts is only {self.num_experts}; "
                "lower top_k or add experts"
            )
        if self.top_k == 1 and self.num_experts > 1:
            texts.append(
                f"top_k is 1 of {self.num_experts} experts, but a single choice always weighs 1 "
                "after renormalisation, so the router would learn nothing; raise top_k to 2"
            )
        refuse(texts)
        return self


class BranchScales(Config):
    """Scales of one kind of branch: x <- alpha * residual + beta * branch(x)."""

    alpha: PositiveFloat = 1.0
    """Residual scale."""
    beta: PositiveFloat = 1.0
    """Branch scale."""


class ResidualConfig(Config):
    """Residual scales that differ by kind of branch, as published configurations may have them."""

    softmax: BranchScales = BranchScales()
    """Softmax attention."""
    lightning: BranchScales = BranchScales()
    """Lightning attention."""
    mlp: BranchScales = BranchScales()
    """Feed-forward, dense or experts."""


class ModelConfig(Config):
    """The hybrid model (Text-01 sec. 2; M1 keeps its architecture)."""

    num_layers: PositiveInt
    """Transformer layers."""
    hidden_size: PositiveInt
    """Residual width."""
    num_heads: PositiveInt
    """Query heads."""
    num_kv_heads: PositiveInt
    """Key and value heads of softmax layers (GQA)."""
    head_dim: PositiveInt
    """Dimensions per head."""
    rotary_dim: PositiveInt
    """First dimensions of each head that RoPE turns in softmax layers; the paper's 64 of 128."""
    rope_theta: PositiveFloat = 10_000.0
    """RoPE base."""
    lightning_per_softmax: NonNegativeInt = 7
    """Lightning layers before each softmax layer; 0 makes every layer softmax."""
    layer_pattern: tuple[Literal["lightning", "softmax"], ...] | None = None
    """Explicit kinds of layers, instead of `lightning_per_softmax`."""
    norm: Literal["post", "pre"] = "post"
    """`post`: the normalised input is the residual, scaled by alpha and beta (DeepNorm);
    `pre`: the usual one."""
    alpha: PositiveFloat | None = None
    """Residual scale; absent: (2 * num_layers) ** 0.25 for post-norm, 1 for pre-norm."""
    beta: PositiveFloat = 1.0
    """Branch scale."""
    residual: ResidualConfig | None = None
    """Scales by kind of branch, instead of `alpha` and `beta`."""
    norm_epsilon: PositiveFloat = 1e-5
    """RMSNorm epsilon."""
    lightning_norm_epsilon: PositiveFloat = 1e-6
    """RMSNorm epsilon inside lightning attention."""
    slope_depth_epsilon: NonNegativeFloat = 0.0
    """Added to the L - 1 that lightning slopes divide by; transformers' `minimax` adds 1e-5."""
    moe: MoeConfig | None = None
    """Experts; absent: a dense SwiGLU of width `ffn_hidden_size`."""
    ffn_hidden_size: PositiveInt | None = None
    """Width of the dense SwiGLU; required without `moe`."""
    tie_embeddings: bool = False
    """Whether the LM head shares the embedding's weight."""
    max_position: PositiveInt = 4096
    """Longest sequence the model is configured for, in tokens."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights."""
    qkv_bias: bool = False
    """Bias of the query, key and value projections of softmax layers (the Qwen2 layout)."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Arithmetic of the trunk; LM head and router are always FP32 (paper sec. 3.2)."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] = "delayed"
    """Scaling of FP8 operands: from the history of maxima, from the tensor at hand, or from blocks
    of it (Transformer Engine's DelayedScaling, Float8CurrentScaling, Float8BlockScaling)."""
    fp8_bf16_ends: NonNegativeInt = 0
    """Layers at either end of the stack that stay BF16 under FP8."""
    vocab_size: PositiveInt | None = None
    """Vocabulary; absent: the tokenizer's, rounded up to a multiple of 64."""

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """Kind of each layer, "lightning" or "softmax"."""
        if self.layer_pattern is not None:
            return self.layer_pattern
        period = self.lightning_per_softmax + 1
        return tuple(
            "softmax" if layer % period == 0 else "lightning"
            for layer in range(1, self.num_layers + 1)
        )

    @property
    def residual_alpha(self) -> float:
        """Residual scale in force."""
        if self.alpha is not None:
            return self.alpha
        return (2 * self.num_layers) ** 0.25 if self.norm == "post" else 1.0

    @property
    def residual_scales(self) -> ResidualConfig:
        """Residual and branch scales in force."""
        if self.residual is not None:
            return self.residual
        scales = BranchScales(alpha=self.residual_alpha, beta=self.beta)
        return ResidualConfig(softmax=scales, lightning=scales, mlp=scales)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        texts = []
        if self.num_heads % self.num_kv_heads:
            texts.append(
                f"num_heads is {self.num_heads}, but must be a multiple of num_kv_heads "
                f"{self.num_kv_heads}; change one of them"
            )
        if self.rotary_dim > self.head_dim or self.rotary_dim % 2:
            texts.append(
                f"rotary_dim is {self.rotary_dim}, but must be even and at most head_dim "
                f"{self.head_dim}; change it"
            )
        if self.layer_pattern is not None and len(self.layer_pattern) != self.num_layers:
            texts.append(
                f"layer_pattern has {len(self.layer_pattern)} entries, but num_layers is "
                f"{self.num_layers}; make them equal"
            )
        if self.residual is not None and (self.alpha is not None or self.beta != 1):
            texts.append(
                "residual is given beside alpha or beta, but replaces both; remove one or the other"
            )
        if self.moe is None and self.ffn_hidden_size is None:
            texts.append(
                "ffn_hidden_size is absent, but a dense model needs it; "
                "add it or a [model.moe] table"
            )
        if self.moe is not None and self.ffn_hidden_size is not None:
            texts.append(
                f"ffn_hidden_size is {self.ffn_hidden_size}, but [model.moe] makes every layer a "
                "mixture; remove it and set moe.ffn_hidden_size"
            )
        refuse(texts)
        return self
