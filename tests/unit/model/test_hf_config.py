"""config.json as a [model] table and back."""

from pathlib import Path

import pytest

from m1.config.loading import load_recipe
from m1.config.schema import BranchScales, ModelConfig, MoeConfig, ResidualConfig
from m1.model.hf.config import parse_config
from m1.model.hf.export import choose_layout, require_representable, write_config
from m1.types import M1Error

RECIPES = Path(__file__).parents[3] / "pipelines" / "recipes"
ORIGIN = Path("folder/config.json")
ALPHA = (2 * 80) ** 0.25

# The values of the published MiniMax-M1, and the keys around them.
PUBLISHED = {
    "architectures": ["MiniMaxM1ForCausalLM"],
    "attention_dropout": 0.0,
    "attn_type_list": 10 * (7 * [0] + [1]),
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "layernorm_full_attention_alpha": ALPHA,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": ALPHA,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": ALPHA,
    "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 10240000,
    "model_type": "minimax_m1",
    "num_attention_heads": 64,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "postnorm": True,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000,
    "rotary_dim": 64,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 200064,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}


def parse(raw):
    return parse_config(raw, ORIGIN)


def refusal(raw):
    with pytest.raises(M1Error) as raised:
        parse(raw)
    return str(raised.value)


def test_the_published_configuration_is_the_recipe_of_456_billion_parameters():
    found = parse(PUBLISHED)
    recipe = load_recipe([RECIPES / "m1_456b.toml"]).model
    moe = recipe.moe.model_copy(update={"aux_loss_coefficient": 0.001})
    assert found.layout == "published"
    assert found.model.residual_alpha == pytest.approx(3.5565588, abs=1e-7)
    same = {"alpha": found.model.alpha, "moe": moe, "vocab_size": 200064}
    differing = ("precision", "fp8_recipe", "fp8_bf16_ends", "max_position", "rope_theta")
    same |= {name: getattr(found.model, name) for name in differing}
    assert found.model == recipe.model_copy(update=same)
    assert (found.model.rope_theta, found.model.rotary_dim) == (1e7, 64)


@pytest.mark.parametrize("layout", ["published", "minimax", "llama", "qwen2"])
def test_what_is_written_is_read_as_it_was(layout):
    config = ModelConfig(
        num_layers=4,
        hidden_size=24,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
        rotary_dim=6 if layout == "published" else 10,
        rope_theta=300.0,
        lightning_per_softmax=1,
        residual=ResidualConfig(mlp=BranchScales(alpha=1.5, beta=0.5)),
        norm_epsilon=1e-4,
        slope_depth_epsilon=1e-5 if layout == "minimax" else 0.0,
        moe=MoeConfig(num_experts=4, top_k=3, ffn_hidden_size=20, aux_loss_coefficient=0.25),
        tie_embeddings=True,
        max_position=99,
        init_std=0.125,
        vocab_size=50,
    )
    if layout in ("llama", "qwen2"):
        changes = {"moe": None, "ffn_hidden_size": 20, "norm": "pre", "lightning_per_softmax": 0}
        changes |= {"residual": None, "qkv_bias": layout == "qwen2"}
        config = config.model_copy(update=changes)
    raw = write_config(config, layout, dtype="bfloat16", token_ids={"eos_token_id": 7})
    found = parse(raw)
    assert (found.layout, raw["eos_token_id"], raw["pad_token_id"]) == (layout, 7, None)
    assert found.model == config


def test_transformers_reads_what_is_written(tmp_path):
    import transformers

    found = parse({**LLAMA, "rope_theta": 300.0, "tie_word_embeddings": True})
    raw = write_config(found.model, "llama")
    config = transformers.AutoConfig.for_model(**raw)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 300.0}
    assert (config.head_dim, config.tie_word_embeddings) == (64, True)


def test_absent_keys_have_the_defaults_of_transformers():
    llama = parse(LLAMA).model
    assert (llama.head_dim, llama.rope_theta, llama.norm_epsilon) == (64, 1e4, 1e-6)
    assert (llama.tie_embeddings, llama.qkv_bias, llama.norm) == (False, False, "pre")
    assert llama.layer_kinds == 30 * ("softmax",)
    assert parse({**LLAMA, "model_type": "qwen2"}).model.qkv_bias
    minimax = {**LLAMA, "model_type": "minimax", "num_local_experts": 4}
    found = parse(minimax).model
    assert found.layer_kinds == 15 * ("softmax", "lightning")
    assert (found.rope_theta, found.norm_epsilon, found.residual_alpha) == (1e6, 1e-5, 1.0)
    assert found.slope_depth_epsilon == 1e-5


def test_the_names_that_the_published_code_writes_are_known():
    for name in ("MiniMaxText01", "MiniMaxM1", "minimax_text_01"):
        assert parse({**PUBLISHED, "model_type": name}).layout == "published"
    absent = {"rotary_dim": None, "rope_theta": None}
    found = parse({**PUBLISHED, **absent}).model
    assert (found.rotary_dim, found.rope_theta) == (128, 1e6)


def test_both_spellings_of_rope_are_read():
    old = {"rope_theta": 5e5, "rope_scaling": None}
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert parse({**LLAMA, **old}).model == parse({**LLAMA, **new}).model
    assert parse({**LLAMA, **old}).model.rope_theta == 5e5


def test_every_feature_that_does_not_exist_here_is_named():
    text = refusal(
        {
            **LLAMA,
            "attention_bias": True,
            "attention_dropout": 0.1,
            "hidden_act": "gelu",
            "mlp_bias": True,
            "partial_rotary_factor": 0.5,
            "quantization_config": {"quant_method": "fp8"},
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
        }
    )
    for reason in (
        "attention_bias is True",
        "attention_dropout is 0.1",
        "hidden_act is 'gelu'",
        "mlp_bias is True",
        "partial_rotary_factor is 0.5",
        "quantization_config is",
        "rope is scaled (llama3)",
    ):
        assert reason in text


def test_every_feature_that_a_published_configuration_may_have_besides_is_named():
    changes = {
        "num_attention_heads": 48,
        "shared_intermediate_size": [0, 512],
        "sliding_window": 4096,
        "router_jitter_noise": 0.1,
        "attn_type_list": [0, 2],
    }
    text = refusal({**PUBLISHED, **changes})
    for reason in (
        "num_attention_heads is 48",
        "shared_intermediate_size is [0, 512]",
        "sliding_window is 4096",
        "router_jitter_noise is 0.1",
        "attn_type_list has 2, but only [0, 1] exist",
        "attn_type_list has 2 entries",
    ):
        assert reason in text


def test_sliding_windows_of_qwen2_are_refused():
    qwen2 = {**LLAMA, "model_type": "qwen2", "num_hidden_layers": 2, "sliding_window": 4096}
    assert parse(qwen2).layout == "qwen2"  # a window without use_sliding_window has no effect
    assert "use_sliding_window" in refusal({**qwen2, "use_sliding_window": True})
    layers = ["full_attention", "sliding_attention"]
    assert "sliding_attention" in refusal({**qwen2, "layer_types": layers})


def test_partial_rotary_in_the_native_layout_is_refused_since_transformers_ignores_it():
    raw = {**LLAMA, "model_type": "minimax", "num_local_experts": 4, "head_dim": 64}
    assert "rotates all 64" in refusal({**raw, "rotary_dim": 32})
    assert parse({**raw, "rotary_dim": 64}).model.rotary_dim == 64


def test_all_absent_keys_are_named():
    text = refusal({"model_type": "minimax"})
    for key in ("hidden_size", "num_hidden_layers", "num_local_experts", "vocab_size"):
        assert f"{key} is absent" in text


def test_numbers_that_do_not_fit_together_are_named():
    assert "num_heads is 9, but must be a multiple" in refusal({**LLAMA, "num_key_value_heads": 2})
    one = {**PUBLISHED, "num_experts_per_tok": 1}
    assert "moe: top_k is 1 of 32 experts" in refusal(one)


def test_another_family_is_refused_with_those_that_exist():
    text = refusal({"model_type": "mamba"})
    assert "'mamba'" in text and "minimax_m1" in text and "qwen2" in text


def test_the_layout_is_the_one_that_can_express_the_model():
    published = parse(PUBLISHED).model
    assert choose_layout(published) == "published"
    full = published.model_copy(update={"rotary_dim": 128})
    assert choose_layout(full) == "minimax"
    assert choose_layout(parse(LLAMA).model) == "llama"
    assert choose_layout(parse({**LLAMA, "model_type": "qwen2"}).model) == "qwen2"


def test_a_layout_that_cannot_express_the_model_is_refused_with_one_that_can():
    published = parse(PUBLISHED).model
    with pytest.raises(M1Error, match=r"rotary_dim 64 differs.*It fits published"):
        require_representable(published, "minimax")
    with pytest.raises(M1Error) as raised:
        require_representable(published, "llama")
    for reason in ("experts", "lightning", "norm = 'pre'", "alpha = beta = 1", "rotary_dim 64"):
        assert reason in str(raised.value)
    with pytest.raises(M1Error, match="biases"):
        require_representable(parse(LLAMA).model, "qwen2")
