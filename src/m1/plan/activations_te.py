"""Tensors kept on the GPU: Transformer Engine's modules in BF16 or FP8, a fused lightning kernel.

Korthikanti et al. 2022 (arXiv 2205.05198, sec. 4) count a layer so; the tensors here are those of
our layer. Sizes in bytes; letters as in `activations.Share`, besides h hidden size, f width of a
SwiGLU, E experts, k of them a token, V rows of the head on this GPU.

What is assumed: projections save their input before the gather of sequence parallelism; FP8
projections save it in one byte; RMSNorm saves its input and a float32 root a token; SwiGLU and its
product with the router's weights are one operation, which saves its input; a lightning layer saves
what SiLU takes and makes q, k and v again; softmax attention is FlashAttention's (q, k, v, output,
float32 log-sum-exp). tests/unit/plan/test_measured_memory.py compares with measured peaks.
"""

from m1.config.model_tables import ModelConfig
from m1.plan.activations import Recompute, Saved, Share, router_bytes

_BF16, _FP32, _INT64 = 2, 4, 8


def layer_tensors(
    model: ModelConfig, kind: str, share: Share, *, is_fp8: bool = False
) -> list[Saved]:
    """Tensors of one layer, `kind` being "lightning" or "softmax"."""
    h, s = model.hidden_size, share.s
    operand = 1 if is_fp8 else _BF16
    attention = _lightning if kind == "lightning" else _softmax
    return [
        Saved("layer input", _BF16 * s * h, "full"),
        Saved("root of the first norm", _FP32 * s),
        Saved("input of the attention's projections", operand * s * h),
        *attention(model, share, operand),
        Saved("input of the second norm", _BF16 * s * h),
        Saved("root of the second norm", _FP32 * s),
        *_feed_forward(model, share, operand),
    ]


def head_tensors(model: ModelConfig, vocab_size: int, share: Share) -> list[Saved]:
    """Final norm, FP32 head and cross entropy, whose gradient overwrites the logits."""
    h, s, t = model.hidden_size, share.s, share.t
    return [
        Saved("input of the final norm", _BF16 * s * h),
        Saved("root of the final norm", _FP32 * s),
        Saved("input of the head", _BF16 * t * h),
        Saved("logits, FP32", _FP32 * t * vocab_size / share.tensor),
        Saved("largest logit and sum of exponentials, FP32", 2 * _FP32 * t),
        Saved("targets", _INT64 * t),
    ]


def _lightning(model: ModelConfig, share: Share, operand: int) -> list[Saved]:
    """SiLU, kernel, norm over the heads times gate; w of each token.

    Without tensor parallelism norm and gate are one operation; with it they are several, and
    `selective` makes them again.
    """
    t, w = share.t, share.w
    tensors = [
        Saved("input of SiLU", _BF16 * t * 3 * w),
        Saved("input of the heads' norm", _BF16 * t * w),
        Saved("root of the heads' norm", _FP32 * t),
        Saved("gate", _BF16 * t * w),
        Saved("input of the output projection", operand * t * w),
    ]
    if share.tensor > 1:
        tensors += [
            Saved("heads' norm: input in FP32, twice", 2 * _FP32 * t * w, "none"),
            Saved("heads' norm: before its weight", _BF16 * t * w, "none"),
            Saved("heads' norm: output", _BF16 * t * w, "none"),
            Saved("sigmoid of the gate", _BF16 * t * w, "none"),
        ]
    return tensors


def _softmax(model: ModelConfig, share: Share, operand: int) -> list[Saved]:
    """RoPE and attention; the attention's output is also the projection's input.

    FP8 projections keep their own copy of it.
    """
    t, w, g = share.t, share.w, share.g
    tensors = [
        Saved("cosines and sines", 2 * _FP32 * t * model.rotary_dim),
        Saved("q, k and v", _BF16 * t * (w + 2 * g)),
        Saved("output of the attention", _BF16 * t * w),
        Saved("log-sum-exp", _FP32 * t * share.heads),
    ]
    if operand != _BF16:
        tensors.append(Saved("input of the output projection", operand * t * w))
    return tensors


def _feed_forward(model: ModelConfig, share: Share, operand: int) -> list[Saved]:
    """MLP or experts; the router keeps the norm's output in BF16."""
    h, s, t, moe = model.hidden_size, share.s, share.t, model.moe
    if moe is None:
        f = (model.ffn_hidden_size or 0) / share.tensor
        norm = Saved("output of the second norm", operand * s * h)
        return [norm, *_swiglu("MLP", t, f, operand, "selective")]
    f = moe.ffn_hidden_size / share.expert_tensor
    tensors = [
        Saved("output of the second norm", _BF16 * s * h),
        Saved("router", router_bytes(s, num_experts=moe.num_experts, top_k=moe.top_k)),
        Saved("rows sent to the experts", operand * share.m * h),
        *_swiglu("experts", share.m, f, operand, "none"),
    ]
    if moe.shared_ffn_hidden_size:
        f = moe.shared_ffn_hidden_size / share.tensor
        tensors += _swiglu("shared expert", t, f, operand, "selective")
        if operand != _BF16:
            tensors.append(Saved("shared expert: input of fc1", operand * s * h))
    return tensors


def _swiglu(name: str, rows: float, f: float, operand: int, survives: Recompute) -> list[Saved]:
    """fc2(SiLU(a) * b) with [a|b] = fc1(x), the product being one operation.

    `survives` is that of the product, which `selective` makes again for the experts.
    """
    return [
        Saved(f"{name}: output of fc1", _BF16 * rows * 2 * f),
        Saved(f"{name}: input of fc2", operand * rows * f, survives),
    ]
