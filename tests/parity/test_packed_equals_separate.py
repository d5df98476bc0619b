"""Sequences packed end to end against the same sequences in passes of their own.

Shapes: T packed tokens, H query heads, KV key-value heads, D head dim.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.config.schema import ModelConfig, MoeConfig
from m1.model.packing import pack

LENGTHS = [33, 1, 20, 2, 70]
PATTERNS = {
    "lightning": ("lightning", "lightning"),
    "softmax": ("softmax", "softmax"),
    "whole": None,
}


def sequences(lengths, *, num_tokens=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(num_tokens, (n + 1,), generator=generator) for n in lengths]


def losses_of(model, group):
    """Per-token losses [T] of sequences packed together."""
    packing = pack(torch.tensor([len(tokens) - 1 for tokens in group]))
    return model(
        torch.cat([tokens[:-1] for tokens in group])[None],
        packing.positions[None],
        None,
        labels=torch.cat([tokens[1:] for tokens in group])[None],
        packed_seq_params=packing,
    )[0]


def losses_and_gradients(model, groups):
    """Losses [T] of all groups, one forward each, and the gradients of their sum by parameter."""
    model.zero_grad()
    losses = [losses_of(model, group) for group in groups]
    torch.cat(losses).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return torch.cat(losses).detach(), gradients


@pytest.fixture(scope="module", params=PATTERNS.values(), ids=PATTERNS.keys())
def model(request, make_model, tiny_config):
    if request.param is None:
        return make_model(tiny_config)
    changes = {"num_layers": len(request.param), "layer_pattern": request.param}
    return make_model(tiny_config.model_copy(update=changes))


def test_losses_and_gradients_of_packed_sequences_are_those_of_separate_passes(model):
    group = sequences(LENGTHS)
    packed, packed_gradients = losses_and_gradients(model, [group])
    separate, separate_gradients = losses_and_gradients(model, [[tokens] for tokens in group])
    # Measured: 1e-6 on losses up to 8.
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-5)
    for name, expected in separate_gradients.items():
        # Measured: 7e-7 of the parameter's largest gradient.
        error = (packed_gradients[name] - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, name


def test_the_order_of_packed_sequences_does_not_matter(model):
    group = sequences(LENGTHS)
    with torch.no_grad():
        forward, backward = losses_of(model, group), losses_of(model, group[::-1])
    expected = torch.cat(backward.split(LENGTHS[::-1])[::-1])
    torch.testing.assert_close(forward, expected, rtol=1e-5, atol=1e-5)


def test_every_copy_of_a_sequence_has_the_same_losses(model):
    (tokens,) = sequences([37])
    with torch.no_grad():
        copies = losses_of(model, [tokens] * 3).view(3, 37)
    torch.testing.assert_close(copies[1:], copies[:1].expand(2, -1), rtol=1e-5, atol=1e-5)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_position_ids_restart_with_every_sequence(lengths):
    packing = pack(torch.tensor(lengths))
    assert packing.positions.tolist() == [t for n in lengths for t in range(n)]
    assert packing.cu_seqlens_q.dtype == torch.int32
    assert packing.cu_seqlens_q.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert packing.max_seqlen_q == max(lengths)


def turn(x, position, *, rotary_dim, theta):
    """RoPE by complex numbers: dimensions i and i + rotary_dim / 2 are one complex number."""
    half = rotary_dim // 2
    number = torch.complex(x[..., :half], x[..., half:rotary_dim])
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = position * frequency
    number = number * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([number.real, number.imag, x[..., rotary_dim:]], dim=-1)


def softmax_attention(hidden, layer, config, lengths):
    """The layer one token and one head at a time in float64: [T, hidden] to [T, hidden]."""
    heads, groups, dim = config.num_heads, config.num_kv_heads, config.head_dim
    per_group = heads // groups
    hidden = hidden.double()
    fused = (hidden @ layer.linear_qkv.weight.double().T).view(-1, groups, per_group + 2, dim)
    q, k, v = fused[:, :, :per_group], fused[:, :, per_group], fused[:, :, per_group + 1]
    rope = {"rotary_dim": config.rotary_dim, "theta": config.rope_theta}
    outputs, start = [], 0
    for length in lengths:
        rows = range(start, start + length)
        keys = torch.stack([turn(k[t], t - start, **rope) for t in rows])
        for t in rows:
            query = turn(q[t], t - start, **rope)  # [KV, H / KV, D]
            seen = t - start + 1
            scores = torch.einsum("ghd,sgd->ghs", query, keys[:seen]) / dim**0.5
            values = v[start : start + seen]
            outputs.append(torch.einsum("ghs,sgd->ghd", scores.softmax(-1), values).flatten())
        start += length
    return torch.stack(outputs) @ layer.linear_proj.weight.double().T


@pytest.mark.parametrize("rotary_dim", [2, 8, 16])
def test_softmax_attention_turns_only_the_first_dimensions(make_model, rotary_dim):
    config = ModelConfig(
        num_layers=1,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rotary_dim=rotary_dim,
        rope_theta=100.0,
        lightning_per_softmax=0,
        moe=MoeConfig(num_experts=2, top_k=2, ffn_hidden_size=8),
        init_std=0.3,
    )
    model = make_model(config)
    layer, lengths = model.decoder.layers[0].self_attention, [40, 1, 23]
    hidden = torch.randn(sum(lengths), 1, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = softmax_attention(hidden.squeeze(1), layer, config, lengths)
        out, bias = layer(
            hidden,
            rotary_pos_emb=model.rotary_pos_emb(max(lengths)),
            packed_seq_params=pack(torch.tensor(lengths)),
        )
    assert bias is None
    # Measured: 5e-6 on outputs up to 9, float32 against float64.
    torch.testing.assert_close(out.squeeze(1).double(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=10)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=5), st.integers(0, 4))
def test_changing_one_sequence_leaves_the_losses_of_the_others(tiny_model, lengths, which):
    which %= len(lengths)
    group = sequences(lengths)
    changed = list(group)
    changed[which] = (group[which] + 7) % 64
    with torch.no_grad():
        before = losses_of(tiny_model, group).split(lengths)
        after = losses_of(tiny_model, changed).split(lengths)
    for number, (a, b) in enumerate(zip(before, after, strict=True)):
        if number != which:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
