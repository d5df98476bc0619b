"""The built model against its definition (PAPER sec. 1), written out here once more.

Shapes: T tokens, H heads, D head dim.
"""

import pytest
import torch

from m1.config.layout import padded_vocab
from m1.config.schema import ModelConfig, MoeConfig, ResidualConfig
from m1.model.build import build_model
from m1.model.lightning import LightningAttention
from m1.model.packing import pack
from m1.model.softmax import SoftmaxAttention
from m1.types import M1Error

LENGTHS = [40, 1, 9]
PACKING = pack(torch.tensor(LENGTHS))


def hidden_states(seed=0):
    return torch.randn(sum(LENGTHS), 1, 32, generator=torch.Generator().manual_seed(seed))


def rms(x, weight, epsilon):
    """x / sqrt(mean(x^2) + epsilon) * weight in float64."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()


def test_seven_lightning_layers_precede_every_softmax_layer(make_model, tiny_config):
    model = make_model(tiny_config.model_copy(update={"num_layers": 16}))
    kinds = [type(layer.self_attention) for layer in model.decoder.layers]
    assert kinds == 2 * [*7 * [LightningAttention], SoftmaxAttention]


def test_a_pattern_decides_every_layer(make_model, tiny_config):
    pattern = ("softmax", "lightning", "lightning")
    changes = {"num_layers": 3, "layer_pattern": pattern}
    model = make_model(tiny_config.model_copy(update=changes))
    kinds = [type(layer.self_attention) for layer in model.decoder.layers]
    assert kinds == [SoftmaxAttention, LightningAttention, LightningAttention]


@pytest.mark.parametrize("tied", [False, True])
def test_the_number_of_parameters_is_that_of_the_architecture(make_model, tied):
    config = ModelConfig(
        num_layers=8,
        hidden_size=24,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
        rotary_dim=6,
        moe=MoeConfig(num_experts=3, top_k=2, ffn_hidden_size=14, shared_ffn_hidden_size=6),
        tie_embeddings=tied,
    )
    hidden, width, vocab = 24, 4 * 10, 64
    lightning = 5 * hidden * width + width  # q, k, v, gate, out; the norm over all heads
    softmax = 2 * hidden * width + 2 * hidden * (2 * 10)  # q, out; k, v
    experts = 3 * (3 * hidden * 14) + 3 * hidden + 3 * hidden * 6  # SwiGLUs, router, shared
    norms = 2 * hidden
    expected = 7 * lightning + softmax + 8 * (experts + norms) + hidden
    expected += vocab * hidden * (1 if tied else 2)
    model = make_model(config, vocab_size=vocab)
    assert sum(p.numel() for p in model.parameters()) == expected


def observed(layer, **arguments):
    """Run a layer on `hidden_states` and note what enters and leaves its two branches."""
    seen = {}

    def note(name):
        def hook(module, arguments, output):
            seen[name] = arguments[0].squeeze(1), output[0].squeeze(1)

        return hook

    hooks = [
        getattr(layer, name).register_forward_hook(note(name)) for name in ("self_attention", "mlp")
    ]
    with torch.no_grad():
        out, _ = layer(hidden_states(), packed_seq_params=PACKING, **arguments)
    for hook in hooks:
        hook.remove()
    return out.squeeze(1), seen


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_block_adds_scaled_branches_to_the_scaled_residual(make_model, tiny_config, norm):
    alpha, beta, epsilon = 1.7, 0.6, 0.25
    changes = {"norm": norm, "alpha": alpha, "beta": beta, "norm_epsilon": epsilon}
    layer = make_model(tiny_config.model_copy(update=changes)).decoder.layers[0]
    out, seen = observed(layer)
    (attention_in, attention_out), (moe_in, moe_out) = seen["self_attention"], seen["mlp"]

    x = hidden_states().squeeze(1)
    normed = rms(x, layer.input_layernorm.weight, epsilon)
    torch.testing.assert_close(attention_in.double(), normed, rtol=1e-5, atol=1e-6)
    x = alpha * (normed if norm == "post" else x.double()) + beta * attention_out.double()
    normed = rms(x, layer.pre_mlp_layernorm.weight, epsilon)
    torch.testing.assert_close(moe_in.double(), normed, rtol=1e-5, atol=1e-6)
    x = alpha * (normed if norm == "post" else x) + beta * moe_out.double()
    torch.testing.assert_close(out.double(), x, rtol=1e-5, atol=1e-5)  # measured: 2e-6


def test_residual_scales_default_to_deepnorm_after_and_one_before(make_model, tiny_config):
    assert tiny_config.residual_alpha == 2.0  # (2 * 8) ** 0.25
    pre = tiny_config.model_copy(update={"norm": "pre"})
    for config, alpha in ((tiny_config, 2.0), (pre, 1.0)):
        scales = make_model(config).config.residual
        for branch in (scales.softmax, scales.lightning, scales.mlp):
            assert (branch.alpha, branch.beta) == (alpha, 1.0)


def test_residual_scales_may_differ_by_kind_of_branch(make_model, tiny_config):
    scales = {"lightning": (1.7, 0.6), "softmax": (1.3, 0.9), "mlp": (0.8, 1.2)}
    residual = ResidualConfig(
        **{kind: {"alpha": alpha, "beta": beta} for kind, (alpha, beta) in scales.items()}
    )
    model = make_model(tiny_config.model_copy(update={"residual": residual}))
    for index, kind in ((0, "lightning"), (7, "softmax")):
        layer = model.decoder.layers[index]
        angles = model.rotary_pos_emb(max(LENGTHS))
        out, seen = observed(layer, rotary_pos_emb=angles)
        (_, attention), (mlp_in, mlp) = seen["self_attention"], seen["mlp"]
        (alpha, beta), (mlp_alpha, mlp_beta) = scales[kind], scales["mlp"]
        x = alpha * layer.input_layernorm(hidden_states().squeeze(1)) + beta * attention
        torch.testing.assert_close(mlp_in, layer.pre_mlp_layernorm(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out, mlp_alpha * mlp_in + mlp_beta * mlp, rtol=1e-5, atol=1e-5)


def test_a_lone_expert_is_a_swiglu_and_its_router_learns_nothing(make_model, tiny_config):
    moe = MoeConfig(num_experts=1, top_k=1, ffn_hidden_size=14)
    mlp = make_model(tiny_config.model_copy(update={"moe": moe})).decoder.layers[0].mlp
    hidden = hidden_states()
    out, _ = mlp(hidden)
    expert = mlp.experts.local_experts[0]
    gate, up = (hidden @ expert.linear_fc1.weight.T).chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * up) @ expert.linear_fc2.weight.T
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    out.sum().backward()
    assert not mlp.router.weight.grad.any()


def test_biases_of_query_key_and_value_are_added_in_softmax_layers_alone(make_model, tiny_config):
    model = make_model(tiny_config.model_copy(update={"qkv_bias": True}))
    biases = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    assert biases == ["decoder.layers.7.self_attention.linear_qkv.bias"]
    attention = model.decoder.layers[7].self_attention
    hidden = hidden_states()
    q, k, v = (x.flatten(1) for x in attention.get_query_key_value_tensors(hidden))
    fused = hidden.squeeze(1) @ attention.linear_qkv.weight.T + attention.linear_qkv.bias
    torch.testing.assert_close(torch.cat([q, k, v], dim=-1), fused, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rotary_dim", "head_dim"), [(30, 44), (2, 49), (16, 16)])
def test_the_rope_table_has_as_many_dimensions_as_configured(
    make_model, tiny_config, rotary_dim, head_dim
):
    changes = {"rotary_dim": rotary_dim, "head_dim": head_dim}
    model = make_model(tiny_config.model_copy(update=changes))
    assert model.rotary_pos_emb(5).shape[-1] == rotary_dim


def test_lightning_attention_follows_its_equation(make_model, tiny_config):
    config = tiny_config.model_copy(update={"lightning_norm_epsilon": 0.5})
    index = 3
    layer = make_model(config).decoder.layers[index].self_attention
    hidden = hidden_states()
    with torch.no_grad():
        out, _ = layer(hidden, packed_seq_params=PACKING)

    x = hidden.squeeze(1).double()
    activated = torch.nn.functional.silu(x @ layer.qkv_proj.weight.double().T)
    outputs, start = [], 0
    for length in LENGTHS:
        rows = []
        for head in range(2):
            fused = activated[start : start + length, 48 * head : 48 * (head + 1)]
            q, k, v = fused.split(16, dim=-1)
            slope = 2 ** (-8 * (head + 1) / 2) * (1 - index / 7 + 1e-5)
            state = torch.zeros(16, 16, dtype=torch.float64)
            per_token = []
            for t in range(length):
                state = torch.exp(torch.tensor(-slope).double()) * state + torch.outer(k[t], v[t])
                per_token.append(q[t] @ state)
            rows.append(torch.stack(per_token))
        outputs.append(torch.cat(rows, dim=-1))
        start += length
    gate = torch.sigmoid(x @ layer.output_gate.weight.double().T)
    expected = gate * rms(torch.cat(outputs), layer.norm_weight, 0.5)
    expected = expected @ layer.out_proj.weight.double().T
    # Measured: 2e-7 on outputs up to 0.5.
    torch.testing.assert_close(out.squeeze(1).double(), expected, rtol=1e-5, atol=1e-5)


def test_experts_are_swiglus_weighted_by_their_renormalised_top_2(make_model, tiny_config):
    mlp = make_model(tiny_config).decoder.layers[0].mlp
    hidden = hidden_states()
    with torch.no_grad():
        out, _ = mlp(hidden)

    x = hidden.squeeze(1).double()
    expected = torch.zeros_like(x)
    for t, token in enumerate(x):
        probabilities = (mlp.router.weight.double() @ token).softmax(0)
        best = probabilities.topk(2)
        for weight, expert in zip(best.values / best.values.sum(), best.indices, strict=True):
            chosen = mlp.experts.local_experts[int(expert)]
            gate, up = (chosen.linear_fc1.weight.double() @ token).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            expected[t] += weight * (chosen.linear_fc2.weight.double() @ inner)
    # Measured: 3e-7 on outputs up to 1.3.
    torch.testing.assert_close(out.squeeze(1).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_same_seed_gives_the_same_weights(process_group, tiny_config):
    first, again, other = (
        build_model(tiny_config, vocab_size=64, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    matrices = [name for name, x in first.items() if isinstance(x, torch.Tensor) and x.ndim == 2]
    assert all(torch.equal(first[name], again[name]) for name in matrices)
    assert not any(torch.equal(first[name], other[name]) for name in matrices)


def test_the_vocabulary_is_the_tokenizers_rounded_up_to_64(tiny_config):
    sizes = [padded_vocab(tiny_config, size) for size in (1, 64, 65, 1000)]
    assert sizes == [64, 64, 128, 1024]


def test_a_configured_vocabulary_is_taken_as_it_is(tiny_config):
    config = tiny_config.model_copy(update={"vocab_size": 301})
    assert padded_vocab(config, 301) == 301
    assert padded_vocab(config, 300) == 301


def test_a_vocabulary_below_the_tokenizers_is_refused(tiny_config):
    config = tiny_config.model_copy(update={"vocab_size": 300})
    with pytest.raises(M1Error, match=r"vocab_size is 300, but the tokenizer has 301 .*raise it"):
        padded_vocab(config, 301)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_fp8_without_a_gpu_is_refused(process_group, tiny_config):
    config = tiny_config.model_copy(update={"precision": "fp8"})
    with pytest.raises(M1Error, match=r"precision is 'fp8'.*no GPU is visible.*'fp32'"):
        build_model(config, vocab_size=64, seed=1)
