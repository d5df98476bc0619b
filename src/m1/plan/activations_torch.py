"""Tensors kept by plain torch in FP32, as the CPU runs it: chunked lightning attention, local MLPs.

Letters as in `activations.Share`, besides h hidden size, f width of a SwiGLU, D head dim, H heads
of this GPU, C tokens of a chunk, M chunks. Counted in floats of 4 bytes. A test compares the sum
with what autograd keeps for built models.
"""

from m1.config.model_tables import ModelConfig
from m1.plan.activations import Saved, Share, router_bytes

_FLOAT = 4
_INT64 = 8
CHUNK_TOKENS = 32
"""Chunk of `m1_kernels.lightning_attention.reference.chunked`."""


def layer_tensors(
    model: ModelConfig, kind: str, share: Share, *, is_fp8: bool = False
) -> list[Saved]:
    """Tensors of one layer, `kind` being "lightning" or "softmax"; `is_fp8` is never true here."""
    del is_fp8
    h, s = model.hidden_size, share.s
    attention = _lightning if kind == "lightning" else _softmax
    return [
        Saved("layer input", _FLOAT * s * h, "full"),
        *_norm("first norm", s, h),
        *attention(model, share),
        Saved("input of the second norm", _FLOAT * s * h),
        *_norm("second norm", s, h),
        *_feed_forward(model, share),
    ]


def head_tensors(model: ModelConfig, vocab_size: int, share: Share) -> list[Saved]:
    """Final norm, head and cross entropy; the softmax overwrites the logits."""
    s, t = share.s, share.t
    return [
        Saved("input of the final norm", _FLOAT * s * model.hidden_size),
        *_norm("final norm", s, model.hidden_size),
        Saved("softmax over the vocabulary", _FLOAT * t * vocab_size / share.tensor),
        Saved("tokens and targets", (2 * _INT64 + 1) * t),
    ]


def _norm(name: str, rows: float, width: float) -> list[Saved]:
    """RMSNorm besides its input: on the CPU torch composes it, and keeps x / rms(x) too."""
    return [
        Saved(f"{name}: root", _FLOAT * rows, "none"),
        Saved(f"{name}: before its weight", _FLOAT * rows * width, "none"),
        Saved(f"{name}: output", _FLOAT * rows * width, "none"),
    ]


def _lightning(model: ModelConfig, share: Share) -> list[Saved]:
    t, w = share.t, share.w
    return [
        Saved("input of SiLU", _FLOAT * t * 3 * w),
        *_chunked(model, share),
        Saved("input of the heads' norm", _FLOAT * t * w),
        Saved("heads' norm: root", _FLOAT * t, "none"),
        Saved("heads' norm: before its weight", _FLOAT * t * w, "none"),
        Saved("heads' norm: output", _FLOAT * t * w, "none"),
        Saved("gate", _FLOAT * t * w),
        Saved("input of the output projection", _FLOAT * t * w),
    ]


def _chunked(model: ModelConfig, share: Share) -> list[Saved]:
    """The operands of its products, each made contiguous, and the constants beside them."""
    chunks = -(-share.t // CHUNK_TOKENS)
    t, w, heads = chunks * CHUNK_TOKENS, share.w, share.heads
    tensors = [
        Saved("q, k and v by chunks", _FLOAT * 3 * t * w),
        Saved("scores inside chunks", _FLOAT * t * heads * CHUNK_TOKENS),
        Saved("which tokens share a sequence", _FLOAT * t * CHUNK_TOKENS),
        Saved("decay inside a chunk", _FLOAT * heads * CHUNK_TOKENS**2),
    ]
    if chunks == 1:
        return tensors
    return [
        *tensors,
        Saved("q and k weighted by their decay, v", _FLOAT * 3 * t * w),
        Saved("weights of q and k", _FLOAT * 2 * t * heads),
        Saved("states before each chunk", _FLOAT * chunks * w * model.head_dim),
        Saved("decay between chunks", _FLOAT * heads * chunks**2),
    ]


def _softmax(model: ModelConfig, share: Share) -> list[Saved]:
    """RoPE, sequences padded to equal length, attention; `t` is exact where lengths are equal."""
    t, w, g = share.t, share.w, share.g
    return [
        Saved("cosines and sines", _FLOAT * 2 * t * model.rotary_dim),
        Saved("rows of the padded sequences", _INT64 * t),
        Saved("q and k after RoPE", _FLOAT * t * (w + g)),
        Saved("output of the projection, of which v is a view", _FLOAT * t * (w + 2 * g)),
        Saved("q, k and v, padded", _FLOAT * t * (w + 2 * g)),
        Saved("output of the attention, padded", _FLOAT * t * w),
        Saved("log-sum-exp", _FLOAT * t * share.heads),
        Saved("input of the output projection", _FLOAT * t * w),
    ]


def _feed_forward(model: ModelConfig, share: Share) -> list[Saved]:
    t, moe = share.t, model.moe
    if moe is None:
        return _swiglu("MLP", t, (model.ffn_hidden_size or 0) / share.tensor)
    f = moe.ffn_hidden_size / share.expert_tensor
    router = router_bytes(share.s, num_experts=moe.num_experts, top_k=moe.top_k)
    tensors = [
        Saved("router", router),
        Saved("rows sent to the experts", _FLOAT * share.m * model.hidden_size),
        *_swiglu("experts", share.m, f),
        Saved("experts: product before the probabilities", _FLOAT * share.m * f),
    ]
    if moe.shared_ffn_hidden_size:
        f = moe.shared_ffn_hidden_size / share.tensor
        tensors += _swiglu("shared expert", t, f)
    return tensors


def _swiglu(name: str, rows: float, f: float) -> list[Saved]:
    """fc2(SiLU(a) * b) with [a|b] = fc1(x): what each factor's gradient needs."""
    return [
        Saved(f"{name}: output of fc1", _FLOAT * rows * 2 * f),
        Saved(f"{name}: SiLU(a)", _FLOAT * rows * f),
        Saved(f"{name}: b plus an offset of 0", _FLOAT * rows * f),
        Saved(f"{name}: input of fc2", _FLOAT * rows * f),
    ]
