"""config.json of Hugging Face models as a [model] table.

What a table cannot say is refused, all of it at once: nothing is left out silently that changes
what the model computes.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from m1.config.schema import Mistakes, ModelConfig
from m1.model.hf.layouts import Layout
from m1.types import M1Error

MODEL_TYPES: dict[str, Layout] = {
    "minimax_text_01": "published",
    "minimax_m1": "published",
    "MiniMaxText01": "published",  # what the published code writes
    "MiniMaxM1": "published",
    "minimax": "minimax",
    "llama": "llama",
    "qwen2": "qwen2",
}
LIGHTNING_NORM_EPSILON = 1e-6
"""Fixed in the published code and in transformers."""
_TRANSFORMERS_SLOPE_EPSILON = 1e-5
_ROPE_THETA: dict[Layout, float] = {"published": 1e6, "minimax": 1e6}
_NORM_EPSILON: dict[Layout, float] = {"llama": 1e-6, "qwen2": 1e-6}
"""Defaults of their classes where they are not 1e4 and 1e-5."""


@dataclass(frozen=True)
class HfConfig:
    """A config.json and what it means here."""

    layout: Layout
    model: ModelConfig
    """With `vocab_size`."""
    raw: dict[str, Any]


@dataclass
class _Reader:
    """A config.json under examination."""

    raw: dict[str, Any]
    problems: list[str] = field(default_factory=list)

    def need(self, key: str) -> Any:
        """The value of a key without a default."""
        if self.raw.get(key) is None:
            self.problems.append(f"{key} is absent")
            return 1
        return self.raw[key]

    def get(self, key: str, default: Any) -> Any:
        """The value of a key; null counts as absent."""
        value = self.raw.get(key)
        return default if value is None else value

    def refuse(self, key: str, reason: str, *, unless: Any) -> None:
        """Note a value other than the one that this model has built in."""
        if self.get(key, unless) != unless:
            self.problems.append(f"{key} is {self.raw[key]!r}, but {reason}")


def layout_of(raw: dict[str, Any]) -> Layout | None:
    """Layout that a config.json is written in."""
    layout = MODEL_TYPES.get(raw.get("model_type", ""))
    if layout == "minimax" and "attn_type_list" in raw and "layer_types" not in raw:
        return "published"
    return layout


def parse_config(raw: dict[str, Any], origin: Path) -> HfConfig:
    """Read a config.json.

    Args:
        raw: Its content.
        origin: The file, for messages.

    Raises:
        M1Error: The model is of another family, lacks keys or has features that do not exist here;
            all of them are named.
    """
    layout = layout_of(raw)
    if layout is None:
        raise M1Error(
            f"{origin} has model_type {raw.get('model_type')!r}, but only {', '.join(MODEL_TYPES)} "
            "can be converted; choose a model of one of these families"
        )
    reader = _Reader(raw)
    if layout == "published":
        fields = _published_fields(reader)
    elif layout == "minimax":
        fields = _minimax_fields(reader)
    else:
        fields = _dense_fields(reader, layout)
    fields["lightning_norm_epsilon"] = LIGHTNING_NORM_EPSILON
    fields |= _common_fields(reader, layout)
    fields.setdefault("rotary_dim", fields["head_dim"])
    fields |= _compact_pattern(fields.pop("kinds"))
    if not reader.problems:
        try:
            return HfConfig(layout, ModelConfig.model_validate(fields), raw)
        except ValidationError as error:
            reader.problems = _texts(error)
    raise M1Error(
        f"the model that {origin} describes does not exist here:\n  "
        + "\n  ".join(reader.problems)
        + "\nChange these values if the weights allow it, or choose another model"
    )


def _common_fields(reader: _Reader, layout: Layout) -> dict[str, Any]:
    hidden, heads = reader.need("hidden_size"), reader.need("num_attention_heads")
    reader.refuse("hidden_act", "only silu exists", unless="silu")
    reader.refuse("attention_dropout", "there is no dropout", unless=0)
    quantization = reader.get("quantization_config", {})
    if quantization.get("quant_method", "gguf") != "gguf":  # read from GGUF, it is saved plain
        reader.refuse("quantization_config", "only plain weights can be converted", unless=None)
    return {
        "num_layers": reader.need("num_hidden_layers"),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": reader.get("num_key_value_heads", heads),
        "head_dim": reader.get("head_dim", hidden // heads),
        "rope_theta": _rope_theta(reader, _ROPE_THETA.get(layout, 1e4)),
        "norm_epsilon": reader.get("rms_norm_eps", _NORM_EPSILON.get(layout, 1e-5)),
        "tie_embeddings": reader.get("tie_word_embeddings", False),
        "max_position": reader.get("max_position_embeddings", 4096),
        "init_std": reader.get("initializer_range", 0.02),
        "vocab_size": reader.need("vocab_size"),
    }


def _rope_theta(reader: _Reader, default: float) -> float:
    scaling = reader.get("rope_parameters", reader.get("rope_scaling", {}))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        reader.problems.append(f"rope is scaled ({kind}), but only default RoPE exists")
    factor = scaling.get("partial_rotary_factor", reader.get("partial_rotary_factor", 1.0))
    if factor != 1:
        reader.problems.append(
            f"partial_rotary_factor is {factor}, which transformers ignores for this model_type; "
            "remove it, or name the rotated dimensions as rotary_dim in a minimax_text_01 config"
        )
    return float(scaling.get("rope_theta", reader.get("rope_theta", default)))


def _published_fields(reader: _Reader) -> dict[str, Any]:
    names = {
        kind: (f"layernorm_{part}_alpha", f"layernorm_{part}_beta")
        for kind, part in (
            ("softmax", "full_attention"),
            ("lightning", "linear_attention"),
            ("mlp", "mlp"),
        )
    }
    types = reader.need("attn_type_list")
    kinds = _kinds(reader, types, {0: "lightning", 1: "softmax"}, "attn_type_list")
    heads = reader.get("num_attention_heads", 1)
    if "lightning" in kinds and heads & (heads - 1):
        reader.problems.append(
            f"num_attention_heads is {heads}, but the published slopes are equal to ours only for "
            "powers of 2"
        )
    shared = reader.get("shared_intermediate_size", 0)
    if any(shared if isinstance(shared, list) else [shared]):
        reader.problems.append(
            f"shared_intermediate_size is {shared}, but a shared expert weighted by its own gate "
            "does not exist"
        )
    norm = "post" if reader.get("postnorm", False) else "pre"
    fields: dict[str, Any] = {"norm": norm, "kinds": kinds}
    if reader.raw.get("rotary_dim") is not None:
        fields["rotary_dim"] = reader.raw["rotary_dim"]
    return {**fields, **_moe_fields(reader), **_residual_fields(reader, names, kinds)}


def _minimax_fields(reader: _Reader) -> dict[str, Any]:
    names = {
        kind: (f"{part}_alpha_factor", f"{part}_beta_factor")
        for kind, part in (("softmax", "full_attn"), ("lightning", "linear_attn"), ("mlp", "mlp"))
    }
    count = reader.get("num_hidden_layers", 0)
    alternating = [("full_attention", "linear_attention")[layer % 2] for layer in range(count)]
    types = {"full_attention": "softmax", "linear_attention": "lightning"}
    kinds = _kinds(reader, reader.get("layer_types", alternating), types, "layer_types")
    head_dim = reader.get("head_dim", reader.raw.get("rotary_dim"))
    if "softmax" in kinds and reader.get("rotary_dim", head_dim) != head_dim:
        reader.problems.append(
            f"rotary_dim is {reader.raw['rotary_dim']}, which transformers ignores for model_type "
            f"'minimax': it rotates all {head_dim}; remove it, or, if the weights were trained so, "
            "use a minimax_text_01 config"
        )
    fields: dict[str, Any] = {"norm": "post", "kinds": kinds}
    if "lightning" in kinds:
        fields["slope_depth_epsilon"] = _TRANSFORMERS_SLOPE_EPSILON
    return {**fields, **_moe_fields(reader), **_residual_fields(reader, names, kinds)}


def _kinds(
    reader: _Reader, types: Any, meanings: dict[Any, str], key: str
) -> tuple[str | None, ...]:
    values = types if isinstance(types, list) else []
    strange = sorted({str(value) for value in values if value not in meanings})
    if strange:
        reader.problems.append(f"{key} has {', '.join(strange)}, but only {list(meanings)} exist")
    if len(values) != reader.get("num_hidden_layers", len(values)):
        reader.problems.append(f"{key} has {len(values)} entries, but not num_hidden_layers many")
    return tuple(meanings.get(value) for value in values)


def _moe_fields(reader: _Reader) -> dict[str, Any]:
    reader.refuse("sliding_window", "softmax attention sees everything before", unless=None)
    reader.refuse("router_jitter_noise", "the router adds no noise", unless=0)
    reader.refuse("attention_bias", "these projections have no bias", unless=False)
    experts = reader.need("num_local_experts")
    if isinstance(experts, list) and len(set(experts)) == 1:
        experts = experts[0]
    return {
        "moe": {
            "num_experts": experts,
            "top_k": reader.get("num_experts_per_tok", 2),
            "ffn_hidden_size": reader.need("intermediate_size"),
            "aux_loss_coefficient": reader.get("router_aux_loss_coef", 0.001),
        },
    }


def _residual_fields(
    reader: _Reader, names: dict[str, tuple[str, str]], kinds: tuple[str | None, ...]
) -> dict[str, Any]:
    """`alpha` and `beta` where all branches that exist have the same, else `residual`."""
    scales = {
        kind: {"alpha": float(reader.get(alpha, 1)), "beta": float(reader.get(beta, 1))}
        for kind, (alpha, beta) in names.items()
    }
    present = [scales[kind] for kind in scales if kind in (*kinds, "mlp")]
    if all(scale == present[0] for scale in present):
        return present[0]
    return {"residual": scales}


def _dense_fields(reader: _Reader, layout: Layout) -> dict[str, Any]:
    reader.refuse("mlp_bias", "the feed-forward has no bias", unless=False)
    if layout == "llama":
        reader.refuse("attention_bias", "the output projection has no bias", unless=False)
    reader.refuse("use_sliding_window", "attention sees everything before", unless=False)
    layers = reader.get("num_hidden_layers", 0)
    types = reader.get("layer_types", ["full_attention"] * layers)
    return {
        "kinds": _kinds(reader, types, {"full_attention": "softmax"}, "layer_types"),
        "norm": "pre",
        "ffn_hidden_size": reader.need("intermediate_size"),
        "qkv_bias": layout == "qwen2",
    }


def _compact_pattern(kinds: tuple[str | None, ...]) -> dict[str, Any]:
    """`lightning_per_softmax` where the layers repeat so, else `layer_pattern`."""
    if "softmax" in kinds:
        before = kinds.index("softmax")
        period = before + 1
        if all((kind == "softmax") == (i % period == before) for i, kind in enumerate(kinds)):
            return {"lightning_per_softmax": before}
    return {"layer_pattern": kinds}


def _texts(error: ValidationError) -> list[str]:
    texts: list[str] = []
    for details in error.errors():
        place = ".".join(map(str, details["loc"]))
        cause = details.get("ctx", {}).get("error")
        found = cause.texts if isinstance(cause, Mistakes) else [details["msg"]]
        texts += [f"{place + ': ' if place else ''}{text}" for text in found]
    return texts
