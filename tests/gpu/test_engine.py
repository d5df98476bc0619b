"""The engine on a GPU: kernels against their references, graphs against eager steps, parity."""

import pytest
import torch
from gpu_workers import MODEL, VOCAB

from m1.config.schema import MoeConfig, OptimizerConfig, ParallelConfig
from m1.inference.core import EngineCore
from m1.inference.limits import EngineLimits
from m1.inference.params import SamplingParams
from m1.plan.memory import Decoding, decoding_bytes

EXPERTS = MoeConfig(num_experts=8, top_k=2, ffn_hidden_size=256, aux_loss_coefficient=0.0)
CONFIG = MODEL.model_copy(update={"moe": EXPERTS, "max_position": 4096, "init_std": 0.05})


@pytest.fixture(scope="module")
def trainer(process_group):
    from m1.train.trainer import Trainer

    return Trainer(
        CONFIG, OptimizerConfig(lr=1e-3), vocab_size=VOCAB, seed=1, parallel=ParallelConfig()
    )


def run(model, *, count=24, new=40, **limits):
    sizes = {"num_slots": 32, "num_pages": 2000, "page_size": 16} | limits
    core = EngineCore(model, num_tokens=VOCAB, limits=EngineLimits(**sizes))
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        prompt = torch.randint(VOCAB, (5 + 17 * number,), generator=generator)
        params = SamplingParams(max_new_tokens=new)
        found += core.add(tuple(prompt.tolist()), params, (number,))
    while not core.is_idle:
        core.step()
    return found, core


def training_logprobs(trainer, sequence, *, replays=False):
    from m1.inference.recorded import unpack_experts
    from m1.train.microbatch import MicroBatch

    ids = torch.tensor(sequence.prompt + tuple(sequence.tokens))
    size = len(ids) - 1
    routed = None
    if replays:
        routed = unpack_experts(sequence.routed_experts, num_tokens=size, num_experts=8)
    batch = MicroBatch(
        ids[:-1], ids[1:], torch.tensor([size]), torch.zeros(size), routed_experts=routed
    )
    return trainer.logprobs([batch])[0][len(sequence.prompt) - 1 :].cpu()


def test_sampled_probabilities_are_the_trainers(trainer):
    found, _ = run(trainer.model)
    inference = torch.cat([torch.tensor(s.logprobs) for s in found]).double().exp()
    training = torch.cat([training_logprobs(trainer, s) for s in found]).double().exp()
    assert torch.corrcoef(torch.stack((inference, training)))[0, 1] > 0.9995


def test_graphs_give_the_bits_of_eager_steps(trainer):
    graphed, core = run(trainer.model, is_invariant=True, record_experts=True)
    assert core._graphs is not None and core._graphs._graphs
    eager, _ = run(trainer.model, is_invariant=True, cuda_graphs=False, record_experts=True)
    assert [s.tokens for s in graphed] == [s.tokens for s in eager]
    assert [s.logprobs for s in graphed] == [s.logprobs for s in eager]
    assert all(s.routed_experts is not None for s in eager)
    assert [s.routed_experts for s in graphed] == [s.routed_experts for s in eager]


def test_replayed_experts_bring_the_trainer_nearer_to_the_engine(trainer):
    from m1.model.routing import take_difference

    found, _ = run(trainer.model, record_experts=True)
    inference = torch.cat([torch.tensor(s.logprobs) for s in found]).double()
    gaps = []
    for replays in (False, True):
        parts = [training_logprobs(trainer, s, replays=replays) for s in found]
        gaps.append((torch.cat(parts).double() - inference).abs().mean())
    assert 0 < take_difference(trainer.model) < 0.1
    assert gaps[1] < gaps[0]


def test_preempted_sequences_come_back_with_their_states(trainer):
    calm, _ = run(trainer.model, is_invariant=True)
    pressed, core = run(trainer.model, is_invariant=True, num_pages=40, num_slots=8)
    assert core.scheduler.num_preemptions > 0
    assert [s.tokens for s in pressed] == [s.tokens for s in calm]


def test_a_request_has_the_same_bits_alone_and_among_others(trainer):
    together, _ = run(trainer.model, is_invariant=True)
    core = EngineCore(
        trainer.model,
        num_tokens=VOCAB,
        limits=EngineLimits(num_slots=32, num_pages=2000, is_invariant=True),
    )
    for number in (0, 7, 23):
        wanted = together[number]
        (alone,) = core.add(wanted.prompt, wanted.params, (number,))
        while not core.is_idle:
            core.step()
        assert (alone.tokens, alone.logprobs) == (wanted.tokens, wanted.logprobs)


def test_the_cache_takes_what_the_plan_says(trainer):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    limits = EngineLimits(num_slots=64, num_pages=64 * 64, page_size=64)
    core = EngineCore(trainer.model, num_tokens=VOCAB, limits=limits)
    held = torch.cuda.memory_allocated() - before
    planned = sum(decoding_bytes(CONFIG, list(CONFIG.layer_kinds), Decoding(64, 64 * 64)))
    assert held == pytest.approx(planned, rel=0.05)
    assert core.cache.num_bytes <= held


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(8, 2, 64), (4, 4, 128), (64, 8, 128)])
def test_paged_attention_is_the_reference(dtype, heads, groups, dim):
    from m1.inference.attention import decode_softmax
    from m1_kernels.paged_attention import paged_attention_decode

    generator = torch.Generator().manual_seed(1)
    page, count = 16, 600
    lengths = torch.tensor([1, 16, 63, 1000, 1024, 1025, 4000])
    table = torch.full((len(lengths), 250), -1)
    order, used = torch.randperm(count - 1, generator=generator), 0
    for row, length in enumerate(lengths.tolist()):
        need = -(-length // page)
        table[row, :need] = order[used : used + need]
        used += need
    keys, values = (
        torch.randn(count, page, groups, dim, generator=generator).to(dtype) for _ in range(2)
    )
    q = torch.randn(len(lengths), heads, dim, generator=generator).to(dtype)
    expected = decode_softmax(q.float(), keys.float(), values.float(), table, lengths)
    moved = [x.cuda() for x in (q, keys, values, table, lengths)]
    out = paged_attention_decode(*moved).cpu()
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=bound)
    alone = [x[3:4].contiguous() if x.shape[0] == len(lengths) else x for x in moved]
    assert torch.equal(paged_attention_decode(*alone).cpu()[0], out[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_invariant_product_has_the_same_bits_for_any_number_of_rows(dtype):
    from m1_kernels.invariant_matmul import invariant_matmul

    x = torch.randn(300, 520, device="cuda").to(dtype)
    w = torch.randn(1030, 520, device="cuda").to(dtype)
    whole = invariant_matmul(x, w)
    for rows in (1, 2, 33, 64, 299):
        assert torch.equal(invariant_matmul(x[:rows], w), whole[:rows])
    torch.testing.assert_close(whole.double(), x.double() @ w.double().t(), rtol=1e-2, atol=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_give_a_row_the_same_bits_in_any_company(dtype):
    from m1_kernels.routed_experts import ExpertTable, routed_experts

    generator = torch.Generator().manual_seed(1)
    shapes = ((200, 512), (8, 512), *[(2 * 384, 512)] * 8, *[(512, 384)] * 8)
    x, router, *weights = (torch.randn(*s, generator=generator).cuda() * 0.05 for s in shapes)
    x, *weights = (t.to(dtype) for t in (x, *weights))
    table = ExpertTable.of(weights[:8], weights[8:])
    whole = routed_experts(x, router, table, top_k=2, block_rows=16)
    for rows in (slice(0, 1), slice(7, 60), slice(199, 200)):
        part = routed_experts(x[rows].contiguous(), router, table, top_k=2, block_rows=16)
        assert torch.equal(part, whole[rows])
