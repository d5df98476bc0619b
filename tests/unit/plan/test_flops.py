"""FLOPs against the closed form and against torch.utils.flop_counter on built models."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from m1.config.model_tables import ModelConfig
from m1.model.packing import pack
from m1.plan.activations_torch import CHUNK_TOKENS
from m1.plan.flops import lightning_flops, softmax_flops, token_flops

LENGTH, VOCAB = 128, 192
NUM_CHUNKS = LENGTH // CHUNK_TOKENS


def counted(model: torch.nn.Module) -> tuple[int, int]:
    """FLOPs of forward and backward, one sequence; attention as two products, which count n^2."""
    packing = pack(torch.tensor([LENGTH]))
    tokens = torch.arange(LENGTH)[None] % VOCAB
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = model(
                tokens, packing.positions[None], None, labels=tokens, packed_seq_params=packing
            )
        with FlopCounterMode(display=False) as backward:
            loss.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def carry_flops(model: ModelConfig) -> int:
    """The CPU's [M, M] product that carries states over chunks, which the plan leaves out."""
    heads, dim = model.num_heads, model.head_dim
    return model.layer_kinds.count("lightning") * 2 * heads * NUM_CHUNKS**2 * dim * dim


def test_flops_are_those_that_torch_counts(make_model, small_model: ModelConfig) -> None:
    forward, backward = counted(make_model(small_model, vocab_size=VOCAB))
    planned = token_flops(
        small_model, VOCAB, sequence_length=LENGTH, mask="full", chunk_tokens=CHUNK_TOKENS
    )
    carry = carry_flops(small_model)
    assert LENGTH * planned.forward + carry == forward
    # The carry's decay has no gradient, so its backward pass is one product, not two.
    assert LENGTH * (planned.training - planned.forward) + carry == backward


def test_causal_attention_costs_half_of_full(dense_model: ModelConfig) -> None:
    full = softmax_flops(dense_model, 100, "full")
    assert full == 4 * 100 * 4 * 16  # 4 n H D
    assert softmax_flops(dense_model, 100, "causal") == full // 2


def test_the_chunked_form_is_that_of_the_kernel() -> None:
    model = ModelConfig(
        num_layers=1,
        hidden_size=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=128,
        rotary_dim=64,
        ffn_hidden_size=8,
    )
    assert lightning_flops(model, "chunked", 64) == 98_304  # a head and token, design notes
    assert lightning_flops(model, "recurrent", 64) == 4 * 128 * 128


def test_only_softmax_attention_grows_with_the_sequence(m1_456b) -> None:
    short = token_flops(m1_456b.model, 200_064, sequence_length=1000)
    long = token_flops(m1_456b.model, 200_064, sequence_length=2000)
    assert long.softmax_attention == 2 * short.softmax_attention == 10 * 4 * 1000 * 64 * 128
    assert long.forward - short.forward == short.softmax_attention


def test_projections_cost_two_flops_for_each_active_weight(m1_456b) -> None:
    flops = token_flops(m1_456b.model, 200_064, sequence_length=1)
    norms = (2 * 80 + 1) * 6144 + 70 * 64 * 128
    assert flops.projections == 2 * (45_944_920_064 - norms)
    assert flops.head == 2 * 200_064 * 6144
