"""Decoding in the compiled function against the same step in PyTorch."""

import multiprocessing

import pytest
import torch

from m1.config.schema import ModelConfig, MoeConfig
from m1.inference.cache import Cache
from m1.inference.core import EngineCore
from m1.inference.host import HostDecoder
from m1.inference.limits import EngineLimits
from m1.inference.params import SamplingParams
from m1.inference.runner import ModelRunner
from m1.inference.steps import Chunk, DecodeRows, Step
from m1_kernels.host_decode import library

pytestmark = pytest.mark.skipif(library() is None, reason="this machine has no C compiler")

BASE = ModelConfig(
    num_layers=4,
    hidden_size=20,  # no multiple of a panel
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    rotary_dim=8,
    lightning_per_softmax=1,
    moe=MoeConfig(num_experts=5, top_k=2, ffn_hidden_size=28),
    max_position=128,
    init_std=0.3,
)
MODELS = {
    "experts": BASE,
    "one expert": BASE.model_copy(
        update={"moe": MoeConfig(num_experts=1, top_k=1, ffn_hidden_size=9)}
    ),
    "shared expert": BASE.model_copy(
        update={
            "moe": MoeConfig(num_experts=4, top_k=3, ffn_hidden_size=16, shared_ffn_hidden_size=24)
        }
    ),
    "dense": BASE.model_copy(update={"moe": None, "ffn_hidden_size": 40}),
    "pre-norm, bias, tied": BASE.model_copy(
        update={"norm": "pre", "qkv_bias": True, "tie_embeddings": True, "beta": 0.7}
    ),
    "heads of 16": BASE.model_copy(update={"head_dim": 16, "rotary_dim": 16, "num_kv_heads": 4}),
}  # fmt: skip
NUM_ROWS, SIZE = 70, 4  # more rows than one block


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def decoders(request, make_model):
    """The step in PyTorch and the compiled one, each with a cache of the same content."""
    runner = ModelRunner(make_model(request.param))
    caches = []
    for _ in range(2):
        cache = Cache(runner.parameters, num_slots=90, num_pages=600, page_size=SIZE)
        generator = torch.Generator().manual_seed(1)
        for table in (cache.states, cache.keys, cache.values):
            table.normal_(generator=generator)
        caches.append(cache)
    return runner, *caches, HostDecoder(runner, caches[1])


def tables_of(cache):
    return cache.states, cache.keys, cache.values


@pytest.fixture(autouse=True)
def same_caches(request):
    """Tests of one module share the caches, and not all of them step both."""
    if "decoders" in request.fixturenames:
        _, expected, cache, _ = request.getfixturevalue("decoders")
        for table, source in zip(tables_of(expected), tables_of(cache), strict=True):
            table.copy_(source)


def step_of(count, *, seed):
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(30, (count,), generator=generator)
    pages = torch.randperm(600, generator=generator)[: count * 8].view(count, 8)
    page = pages.gather(1, (positions // SIZE)[:, None]).squeeze(1)
    return Step(
        tokens=torch.randint(64, (count,), generator=generator),
        positions=positions,
        places=page * SIZE + positions % SIZE,
        decode=DecodeRows(
            slots=torch.randperm(90, generator=generator)[:count],
            pages=pages,
            lengths=positions + 1,
            count=count,
        ),
    )


def rows_of(step, rows):
    decode = step.decode
    return Step(
        tokens=step.tokens[rows],
        positions=step.positions[rows],
        places=step.places[rows],
        decode=DecodeRows(
            slots=decode.slots[rows],
            pages=decode.pages[rows],
            lengths=decode.lengths[rows],
            count=len(step.tokens[rows]),
        ),
    )


def test_logits_states_and_keys_are_those_of_the_step_in_pytorch(decoders):
    runner, expected, cache, decoder = decoders
    for count, seed in ((NUM_ROWS, 1), (1, 2), (7, 3)):
        step = step_of(count, seed=seed)
        logits = runner(step, expected)
        # Measured: 3e-6 of logits up to 6, and of states.
        torch.testing.assert_close(decoder(step), logits, atol=3e-5, rtol=1e-5)
        for made, wanted in zip(tables_of(cache), tables_of(expected), strict=True):
            torch.testing.assert_close(made, wanted, atol=3e-5, rtol=1e-5)


def test_bits_depend_neither_on_other_rows_nor_on_threads(decoders):
    *_, cache, decoder = decoders
    step = step_of(NUM_ROWS, seed=4)
    tables = tables_of(cache)
    before = [table.clone() for table in tables]

    def run(rows, threads=1):
        for table, content in zip(tables, before, strict=True):
            table.copy_(content)
        torch.set_num_threads(threads)
        try:
            return decoder(rows_of(step, rows)), cache.states.clone()
        finally:
            torch.set_num_threads(1)

    logits, states = run(slice(0, NUM_ROWS))
    threaded, threaded_states = run(slice(0, NUM_ROWS), threads=3)
    assert torch.equal(threaded, logits) and torch.equal(threaded_states, states)
    for rows in (slice(0, 1), slice(69, 70), slice(11, 24)):
        assert torch.equal(run(rows)[0], logits[rows])


def test_a_forked_process_decodes_with_threads_of_its_own(decoders):
    *_, decoder = decoders
    step = step_of(NUM_ROWS, seed=6)
    torch.set_num_threads(2)
    try:
        decoder(step)
        child = multiprocessing.get_context("fork").Process(target=decoder, args=(step,))
        child.start()
        child.join(timeout=60)
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(1)


def test_prompts_beside_rows_get_the_logits_that_they_get_alone(decoders):
    runner, expected, _, decoder = decoders
    rows, pages = step_of(3, seed=5), torch.tensor([590, 591])
    tokens, positions = torch.tensor([5, 6, 7, 8, 9]), torch.arange(5)
    step = Step(
        tokens=torch.cat((rows.tokens, tokens)),
        positions=torch.cat((rows.positions, positions)),
        places=torch.cat((rows.places, pages[positions // SIZE] * SIZE + positions % SIZE)),
        decode=rows.decode,
        chunks=[Chunk(slot=89, start=0, count=5, pages=pages)],
        logits_of=torch.tensor([0, 1, 2, 7]),
    )
    logits = runner(step, expected)
    torch.testing.assert_close(decoder(step), logits, atol=3e-5, rtol=1e-5)
    step.logits_of = torch.tensor([0, 1, 2])  # a prompt that goes on later
    assert decoder(step).shape == (3, logits.shape[1])


def test_new_weights_reach_the_compiled_step(make_model):
    model = make_model(BASE)
    limits = EngineLimits(num_slots=4, num_pages=40, page_size=SIZE)
    core = EngineCore(model, num_tokens=60, limits=limits)
    assert core._host is not None
    plain = EngineCore(model, num_tokens=60, limits=EngineLimits(4, 40, SIZE, host_kernel=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    found = []
    for engine in (core, plain):
        engine.weights_changed(version=1, recompute=False)
        (sequence,) = engine.add((1, 2, 3), SamplingParams(max_new_tokens=20), (1,))
        while not engine.is_idle:
            engine.step()
        found.append(sequence)
    assert plain._host is None
    assert found[0].tokens == found[1].tokens
    assert found[0].logprobs == pytest.approx(found[1].logprobs, abs=1e-5)
