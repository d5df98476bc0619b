"""Kept tensors: the FP32 list against autograd on the CPU, the GPU's list against sums by hand.

Nothing here runs Transformer Engine: its list is read from code and awaits a GPU.
"""

import pytest
import torch

from m1.config.model_tables import ModelConfig
from m1.config.training_tables import ParallelConfig
from m1.model.packing import pack
from m1.plan import activations_te, activations_torch
from m1.plan.activations import Saved, dropped_bytes, kept_bytes, share_of

VOCAB = 192


def autograd_bytes(model: torch.nn.Module, lengths: list[int]) -> int:
    """Bytes of the distinct storages that autograd saves, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}  # holds them, so that no address is used twice

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in parameters:
            saved.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    packing = pack(torch.tensor(lengths))
    tokens = torch.arange(sum(lengths))[None] % VOCAB
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(tokens, packing.positions[None], None, labels=tokens, packed_seq_params=packing)
    return sum(x.untyped_storage().nbytes() for x in saved.values())


def planned_bytes(model: ModelConfig, num_tokens: int) -> float:
    share = share_of(model, ParallelConfig(), num_tokens)
    tensors = activations_torch.head_tensors(model, VOCAB, share)
    for kind in model.layer_kinds:
        tensors += activations_torch.layer_tensors(model, kind, share)
    return sum(x.num_bytes for x in tensors)


# Sequences of equal length, as padding in softmax layers is not planned for; one chunk, several,
# and a last chunk that is not full. Measured difference: at most 0.03%.
@pytest.mark.parametrize("lengths", [[16, 16], [64, 64], [50, 50]])
def test_fp32_tensors_are_those_that_autograd_keeps(
    make_model, small_model: ModelConfig, lengths: list[int]
) -> None:
    model = make_model(small_model, vocab_size=VOCAB).train()
    measured = autograd_bytes(model, lengths)
    assert planned_bytes(small_model, sum(lengths)) == pytest.approx(measured, rel=0.05)


def by_name(tensors: list[Saved]) -> dict[str, float]:
    found = {x.name: x.num_bytes for x in tensors}
    assert len(found) == len(tensors), "two tensors of one name"
    return found


@pytest.fixture
def published(m1_456b) -> ModelConfig:
    model: ModelConfig = m1_456b.model
    return model


def test_a_lightning_layer_on_one_gpu_keeps_these_bytes_of_a_token(published) -> None:
    share = share_of(published, ParallelConfig(), 1)
    hidden, width, ffn, experts = 6144, 64 * 128, 9216, 32
    expected = 2 * hidden * 4  # layer input, both norms' outputs, input of the second norm
    expected += 2 * width * (3 + 1 + 1 + 1)  # input of SiLU, of the norm, gate, product
    expected += 2 * 2 * (hidden + ffn * (2 + 1))  # two experts' rows and SwiGLU
    expected += 3 * 4 + 9 * experts + 2 * 32  # roots of norms; router
    found = sum(x.num_bytes for x in activations_te.layer_tensors(published, "lightning", share))
    assert found == expected


def test_tensor_parallelism_cuts_every_tensor_but_the_cosines_and_the_heads_root(published) -> None:
    for kind in ("lightning", "softmax"):
        two, four = (
            by_name(
                activations_te.layer_tensors(
                    published, kind, share_of(published, ParallelConfig(tensor=n, expert=n), 8192)
                )
            )
            for n in (2, 4)
        )
        whole = {name for name in two if two[name] != 2 * four[name]}
        assert (
            whole
            == {
                "lightning": {"root of the heads' norm"},
                "softmax": {"cosines and sines"},
            }[kind]
        )


def test_context_parallelism_cuts_all_tensors(published) -> None:
    one, two = (
        sum(
            x.num_bytes
            for x in activations_te.layer_tensors(
                published, "softmax", share_of(published, ParallelConfig(context=n), 8192)
            )
        )
        for n in (1, 2)
    )
    assert two == one / 2


def test_fp8_keeps_the_inputs_of_projections_in_one_byte(published) -> None:
    share = share_of(published, ParallelConfig(), 1)
    bf16, fp8 = (
        by_name(activations_te.layer_tensors(published, "lightning", share, is_fp8=is_fp8))
        for is_fp8 in (False, True)
    )
    halved = {name for name in bf16 if fp8[name] == bf16[name] / 2}
    assert halved == {
        "input of the attention's projections",
        "input of the output projection",
        "rows sent to the experts",
        "experts: input of fc2",
    }
    assert all(fp8[name] == bf16[name] for name in set(bf16) - halved)


@pytest.mark.parametrize("tensors", [activations_te, activations_torch])
@pytest.mark.parametrize("kind", ["lightning", "softmax"])
def test_full_recomputation_keeps_the_layer_input_alone(published, tensors, kind: str) -> None:
    share = share_of(published, ParallelConfig(), 1)
    found = tensors.layer_tensors(published, kind, share)
    assert kept_bytes(found, "full") == by_name(found)["layer input"]
    everything = kept_bytes(found, "none")
    for recompute in ("none", "selective", "full"):
        assert kept_bytes(found, recompute) + dropped_bytes(found, recompute) == everything


def test_selective_recomputation_drops_the_swiglu_and_under_tensor_ranks_the_norm(
    published,
) -> None:
    for ranks, more in ((1, set()), (2, {"heads' norm: output", "sigmoid of the gate"})):
        share = share_of(published, ParallelConfig(tensor=ranks, expert=ranks), 1)
        found = activations_te.layer_tensors(published, "lightning", share)
        dropped = {x.name for x in found if x.survives == "none"}
        assert dropped >= {"experts: input of fc2"} | more
        assert (len(dropped) == 1) == (ranks == 1)
