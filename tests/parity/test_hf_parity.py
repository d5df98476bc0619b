"""Logits and gradients of loaded models against transformers, and the way back.

Shapes: B rows, T tokens, V vocabulary.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from m1.model.hf import load_hf, save_hf
from m1.model.hf.layouts import hf_views, tensor_shapes

NUM_TOKENS = 90

# Every number differs from transformers' defaults; head_dim * heads is never hidden_size.
MINIMAX = {
    "vocab_size": NUM_TOKENS,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "full_attn_alpha_factor": 1.6,
    "full_attn_beta_factor": 0.7,
    "linear_attn_alpha_factor": 1.6,
    "linear_attn_beta_factor": 0.7,
    "mlp_alpha_factor": 1.6,
    "mlp_beta_factor": 0.7,
}
LINEAR, FULL = "linear_attention", "full_attention"
MINIMAX_CONFIGS = {
    "seven to one": {"layer_types": 7 * [LINEAR] + [FULL]},
    "one to one": {"layer_types": 2 * [LINEAR, FULL], "num_key_value_heads": 1},
    "all lightning": {"layer_types": 3 * [LINEAR], "num_local_experts": 8},
    "all softmax": {"layer_types": 3 * [FULL], "num_key_value_heads": 4},
    "one expert": {
        "layer_types": [LINEAR, FULL],
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
    },
    "eight experts, top 3": {
        "layer_types": [FULL, LINEAR, LINEAR],
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
    },
    "three heads": {
        "layer_types": [LINEAR, FULL],
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 14,
    },
    "scales by branch": {
        "layer_types": 2 * [FULL, LINEAR],
        "full_attn_alpha_factor": 1.3,
        "linear_attn_beta_factor": 1.4,
        "mlp_alpha_factor": 0.8,
        "mlp_beta_factor": 1.2,
    },
    "tied, two lightning layers": {"layer_types": 2 * [LINEAR], "tie_word_embeddings": True},
    "transformers' defaults": {
        "layer_types": None,
        "num_hidden_layers": 4,
        "rope_parameters": None,
        **{key: 1 for key in MINIMAX if key.endswith("_factor")},
    },
}
DENSE = {
    "vocab_size": NUM_TOKENS,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
DENSE_CONFIGS = {
    "llama": {"model_type": "llama", "head_dim": 10},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
}


def build(values):
    """transformers' model with norms and biases that differ, so that none can be mistaken."""
    import transformers

    values = {"model_type": "minimax", **values}
    if values.get("layer_types"):
        values["num_hidden_layers"] = len(values["layer_types"])
    config = transformers.AutoConfig.for_model(**values)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
    return model.eval()


@pytest.fixture(
    scope="module",
    params=[
        *[pytest.param({**MINIMAX, **v}, id=k) for k, v in MINIMAX_CONFIGS.items()],
        *[pytest.param({**DENSE, **v}, id=k) for k, v in DENSE_CONFIGS.items()],
    ],
)
def pair(request, tmp_path_factory):
    """transformers' model, the folder it saved, and ours."""
    theirs = build(request.param)
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return theirs, folder, load_hf(folder)


def rows():
    # transformers' lightning block is 256 tokens.
    return torch.randint(NUM_TOKENS, (2, 300), generator=torch.Generator().manual_seed(0))


def relative(value, expected):
    """||a - b|| / ||b||, and ||a|| where b is zero."""
    norm = expected.norm()
    return float((value - expected).norm() / (norm if norm else 1))


def loss(logits, tokens):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def test_logits_are_equal(pair):
    theirs, _, ours = pair
    with torch.no_grad():
        expected, logits = theirs(rows()).logits, ours(rows())
    assert logits.dtype == torch.float32 and logits.shape == (2, 300, NUM_TOKENS)
    # Measured: at most 3e-6.
    assert relative(logits, expected) <= 1e-5


def gradients_in_files(theirs, folder):
    """Their gradients as transformers saves them: it splits what it fuses in memory."""
    parameters = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(folder)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(parameters[name])
    return load_file(folder / "model.safetensors")


def test_the_gradient_of_every_parameter_is_equal(pair, tmp_path):
    theirs, _, ours = pair
    tokens = rows()
    loss(theirs(tokens).logits, tokens).backward()
    loss(ours(tokens), tokens).backward()
    gradients = {name: parameter.grad for name, parameter in ours.gpt.named_parameters()}
    expected = gradients_in_files(theirs, tmp_path)
    views = hf_views(gradients, ours.config)
    assert views.keys() == tensor_shapes(ours.config).keys() <= expected.keys()
    errors = {
        name: relative(view.reshape(expected[name].shape), expected[name])
        for name, view in views.items()
    }
    # Measured: at most 1e-5.
    assert max(errors.values()) <= 1e-4, max(errors.items(), key=lambda item: item[1])


def test_saving_a_loaded_model_changes_no_bit(pair, tmp_path):
    _, folder, ours = pair
    save_hf(ours, tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    skipped = {name.rsplit(".", 1)[1] for name in before.keys() - after.keys()}
    assert skipped <= {"slope_rate", "query_decay", "key_decay", "diagonal_decay"}
    assert not after.keys() - before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    texts = [(path / "config.json").read_text() for path in (folder, tmp_path)]
    assert json.loads(texts[0]) == json.loads(texts[1])


def test_what_is_saved_loads_in_transformers_with_the_same_logits(pair, tmp_path):
    from transformers import AutoModelForCausalLM

    theirs, _, ours = pair
    save_hf(ours, tmp_path, max_shard_bytes=20_000)  # several files
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, local_files_only=True, attn_implementation="eager"
    )
    with torch.no_grad():
        assert torch.equal(loaded(rows()).logits, theirs(rows()).logits)


def test_rows_do_not_see_each_other(pair):
    _, _, ours = pair
    with torch.no_grad():
        together, alone = ours(rows()), ours(rows()[1:])
    # Measured: at most 1.3e-6; a batch of another size is multiplied in another order.
    assert relative(together[1:], alone) <= 1e-5


def test_weights_in_the_names_of_memory_load_too(tmp_path):
    theirs = build({**MINIMAX, **MINIMAX_CONFIGS["one to one"]})
    theirs.save_pretrained(tmp_path, save_original_format=False)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    with torch.no_grad():
        assert relative(load_hf(tmp_path)(rows()), theirs(rows()).logits) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_come_back_as_they_were(tmp_path, dtype):
    theirs = build({**MINIMAX, **MINIMAX_CONFIGS["one to one"]}).to(dtype)
    theirs.save_pretrained(tmp_path / "before")
    ours = load_hf(tmp_path / "before")
    assert all(parameter.dtype == torch.float32 for parameter in ours.parameters())
    save_hf(ours, tmp_path / "after")
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("before", "after")
    )
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_loading_leaves_the_callers_random_numbers_alone(pair):
    _, folder, _ = pair
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_hf(folder)
    assert torch.equal(torch.rand(3), expected)
