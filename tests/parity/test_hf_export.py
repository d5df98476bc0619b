"""The exported model under transformers against ours.

Shapes: T tokens, V vocabulary.
"""

import json

import pytest
import torch

from m1.config.schema import SamplingConfig
from m1.inference.engine import LocalEngine, Request
from m1.model.hf import export_hf, load_hf, require_representable
from m1.model.hf.layouts import split_qkv
from m1.model.packing import pack
from m1.types import M1Error

BUFFERS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")


@pytest.fixture(scope="module")
def config(tiny_config):
    """Every number differs from transformers' default, and two query heads share a key head."""
    return tiny_config.model_copy(
        update={
            "num_heads": 4,
            "num_kv_heads": 2,
            "rope_theta": 500.0,
            "alpha": 1.6,
            "beta": 0.7,
            "norm_epsilon": 1e-3,
        }
    )


@pytest.fixture(scope="module")
def model(make_model, config):
    return make_model(config)


@pytest.fixture(scope="module")
def folder(model, config, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "hf"
    export_hf(model, config, path, eos_token_id=4, pad_token_id=1)
    return path


def load(folder):
    """transformers' model and what it says about loading."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@torch.no_grad()
def our_logits(model, tokens):
    packing = pack(torch.tensor([len(tokens)]))
    return model(tokens[None], packing.positions[None], None, packed_seq_params=packing)[0]


def prompts(lengths, num_tokens=64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(num_tokens, (length,), generator=generator) for length in lengths]


def test_every_weight_finds_its_place(loaded):
    _, info = loaded
    assert {name.rsplit(".", 1)[1] for name in info["missing_keys"]} <= {*BUFFERS}
    assert not info["unexpected_keys"] and not info["mismatched_keys"]


def test_decay_buffers_are_those_of_a_freshly_built_model(loaded):
    import transformers

    theirs, _ = loaded
    fresh = dict(transformers.AutoModelForCausalLM.from_config(theirs.config).named_buffers())
    buffers = dict(theirs.named_buffers())
    assert buffers.keys() == fresh.keys()
    assert sum(name.endswith(BUFFERS) for name in buffers) == 7 * len(BUFFERS)
    for name, expected in fresh.items():
        torch.testing.assert_close(buffers[name], expected, rtol=0, atol=0)


def test_logits_equal_ours(loaded, model):
    theirs, _ = loaded
    for tokens in prompts([1, 33, 200, 300]):  # transformers' lightning block is 256 tokens
        with torch.no_grad():
            expected = theirs(tokens[None]).logits[0]
        error = (our_logits(model, tokens) - expected).abs().max() / expected.abs().max()
        # Measured: 5e-7, although their slopes divide by L - 1 + 1e-5 and ours by L - 1.
        assert error < 1e-5


def test_greedy_completions_equal_those_of_our_engine(loaded, model):
    theirs, _ = loaded
    tokens = prompts([2, 9, 33, 64])
    engine = LocalEngine(model, stop_token=4, num_tokens=64)
    greedy = SamplingConfig(temperature=0, max_new_tokens=16)
    requests = [Request(tuple(prompt.tolist()), (0,)) for prompt in tokens]
    for prompt, (completion,) in zip(tokens, engine.generate(requests, greedy), strict=True):
        generated = theirs.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            do_sample=False,
            max_new_tokens=16,
            top_p=None,
            temperature=None,
        )
        assert generated[0, len(prompt) :].tolist() == list(completion.tokens)


def test_the_generation_config_names_the_stop_token_and_the_papers_sampling(loaded):
    generation = loaded[0].generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (4, 1)
    assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 1.0, 0.95)


def test_a_padded_vocabulary_is_exported_whole(make_model, config, tmp_path):
    model = make_model(config, vocab_size=100)
    export_hf(model, config, tmp_path, eos_token_id=4, pad_token_id=1)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 100
    theirs, _ = load(tmp_path)
    (tokens,) = prompts([20], num_tokens=100)
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    # Measured: 2e-6 on logits up to 6.
    torch.testing.assert_close(our_logits(model, tokens), expected, rtol=1e-5, atol=1e-5)


def test_tied_embeddings_stay_tied(make_model, config, tmp_path):
    config = config.model_copy(update={"tie_embeddings": True})
    model = make_model(config)
    export_hf(model, config, tmp_path, eos_token_id=4, pad_token_id=1)
    theirs, _ = load(tmp_path)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    (tokens,) = prompts([20])
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    # Measured: 2e-6 on logits up to 6.
    torch.testing.assert_close(our_logits(model, tokens), expected, rtol=1e-5, atol=1e-5)


def test_fused_query_key_value_rows_are_grouped_by_key_head(config):
    # Row r of group g: query heads 2g and 2g + 1, then key head g, then value head g.
    names = [f"q{2 * g + i}" for g in range(2) for i in range(2)]
    order = ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]
    fused = torch.arange(8.0).repeat_interleave(config.head_dim)[:, None]
    q, k, v = (part.reshape(-1, 1) for part in split_qkv(fused, config))
    assert q[:: config.head_dim, 0].tolist() == [order.index(name) for name in names]
    assert k[:: config.head_dim, 0].tolist() == [2, 6]
    assert v[:: config.head_dim, 0].tolist() == [3, 7]


def test_every_reason_against_an_export_is_named(config):
    moe = config.moe.model_copy(update={"shared_ffn_hidden_size": 8})
    changes = {"rotary_dim": 8, "moe": moe, "norm": "pre", "lightning_norm_epsilon": 1e-5}
    with pytest.raises(M1Error) as raised:
        require_representable(config.model_copy(update=changes))
    for reason in ("rotary_dim 8", "shared expert", "norm = 'post'", "fixed at 1e-6"):
        assert reason in str(raised.value)


def test_a_model_without_a_layout_is_not_exported_and_nothing_is_written(model, config, tmp_path):
    dense = config.model_copy(update={"moe": None, "ffn_hidden_size": 8})
    with pytest.raises(M1Error, match="as llama: it has no lightning layers"):
        export_hf(model, dense, tmp_path / "hf", eos_token_id=4, pad_token_id=1)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("qkv_bias", "name"), [(False, "LlamaForCausalLM"), (True, "Qwen2ForCausalLM")]
)
def test_a_dense_pre_norm_softmax_model_is_exported_as_llama_or_qwen2(
    make_model, config, tmp_path, qkv_bias, name
):
    changes = {"moe": None, "ffn_hidden_size": 40, "norm": "pre", "lightning_per_softmax": 0}
    changes |= {"alpha": None, "beta": 1.0, "qkv_bias": qkv_bias, "num_layers": 3}
    model = make_model(config.model_copy(update=changes))
    export_hf(model, config.model_copy(update=changes), tmp_path, eos_token_id=4, pad_token_id=1)
    theirs, info = load(tmp_path)
    assert type(theirs).__name__ == name and not info["missing_keys"]
    (tokens,) = prompts([20])
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    # Measured: 3e-6 on logits up to 6.
    torch.testing.assert_close(our_logits(model, tokens), expected, rtol=1e-5, atol=1e-5)


def test_partial_rotary_is_exported_in_the_published_layout(make_model, config, tmp_path):
    config = config.model_copy(update={"rotary_dim": 8})
    model = make_model(config)
    export_hf(model, config, tmp_path, eos_token_id=4, pad_token_id=1)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["rotary_dim"]) == ("minimax_text_01", 8)
    (tokens,) = prompts([20])
    with torch.no_grad():
        assert torch.equal(load_hf(tmp_path)(tokens[None])[0], our_logits(model, tokens))


def test_settings_of_absent_layers_do_not_prevent_an_export(config):
    require_representable(
        config.model_copy(update={"layer_pattern": 8 * ("lightning",), "rotary_dim": 8})
    )
    require_representable(
        config.model_copy(update={"layer_pattern": 8 * ("softmax",), "lightning_norm_epsilon": 0.1})
    )
