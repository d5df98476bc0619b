"""The compiled sampler against closed forms, and what happens where nothing compiles."""

import logging
import math

import pytest
import torch

from m1_kernels.host_decode import draw
from m1_kernels.host_decode.shared_library import library

HAS_COMPILER = library() is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="this machine has no C compiler")
PROBABILITIES = (0.1, 0.4, 0.05, 0.25, 0.2)


def grid(count):
    """The middles of `count` equal parts of [0, 1)."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def drawn(logits, uniform, temperature=1.0, **options):
    rows = logits.expand(len(uniform), -1).contiguous()
    options = {"num_tokens": logits.shape[-1]} | options
    return draw(rows, uniform, torch.full((len(uniform),), temperature), **options)


@needs_compiler
def test_an_even_grid_of_random_numbers_hits_every_token_by_its_probability():
    logits = torch.tensor(PROBABILITIES).log() + 3.0  # a constant changes nothing
    found = drawn(logits, grid(1000))
    assert torch.bincount(found.tokens, minlength=5).tolist() == [100, 400, 50, 250, 200]
    expected = torch.tensor(PROBABILITIES).log()[found.tokens]
    torch.testing.assert_close(found.logprobs, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.sampling_logprobs, expected, atol=1e-6, rtol=0)
    entropy = -sum(p * math.log(p) for p in PROBABILITIES)
    torch.testing.assert_close(found.entropies, torch.full((1000,), entropy), atol=1e-6, rtol=0)


@needs_compiler
def test_temperature_raises_probabilities_to_its_inverse():
    found = drawn(torch.tensor(PROBABILITIES).log(), grid(10_000), temperature=0.5)
    squared = torch.tensor(PROBABILITIES).square()
    counts = torch.bincount(found.tokens, minlength=5) / 10_000
    torch.testing.assert_close(counts, squared / squared.sum(), atol=1e-4, rtol=0)
    sampling = (squared / squared.sum()).log()[found.tokens]
    torch.testing.assert_close(found.sampling_logprobs, sampling, atol=1e-6, rtol=0)
    plain = torch.tensor(PROBABILITIES).log()[found.tokens]
    torch.testing.assert_close(found.logprobs, plain, atol=1e-6, rtol=0)


@needs_compiler
@pytest.mark.parametrize("vocab", [1, 7, 64, 65, 1000, 5003])
def test_draws_are_those_of_float64(vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = 3 * torch.randn(50, vocab, generator=generator)
    uniform = torch.rand(50, dtype=torch.float64, generator=generator)
    found = draw(logits, uniform, torch.ones(50), num_tokens=vocab)
    exact = logits.double().log_softmax(-1)
    cumulative = exact.exp().cumsum(-1)
    # Rounding may move a bound between two tokens by some 1e-7 of the mass, and no more.
    at = found.tokens[:, None]
    before = cumulative.gather(1, at) - exact.exp().gather(1, at)
    assert (before.squeeze(1) - 1e-6 <= uniform).all()
    assert (uniform <= cumulative.gather(1, at).squeeze(1) + 1e-6).all()
    chosen = exact.gather(1, at).squeeze(1)
    # Measured: 5e-7.
    assert (found.logprobs.double() - chosen).abs().max() < 4e-6
    assert (found.entropies.double() + (exact.exp() * exact).sum(-1)).abs().max() < 4e-6


@needs_compiler
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 5.0])
def test_ids_without_weight_and_ids_past_the_tokens_are_never_drawn(temperature):
    logits = torch.full((200,), -math.inf)
    logits[[3, 64, 130]] = torch.tensor([1.0, 2.0, 0.5])
    logits[150:] = 9.0  # padding of the embedding
    ends = torch.tensor([0.0, 0.999999, 1 - 2**-53], dtype=torch.float64)
    found = drawn(logits, torch.cat((grid(500), ends)), temperature, num_tokens=150)
    assert set(found.tokens.tolist()) == ({64} if temperature == 0 else {3, 64, 130})
    assert found.tokens[-1] == (64 if temperature == 0 else 130)
    assert found.logprobs.isfinite().all()
    if temperature == 0:
        assert (found.sampling_logprobs == 0).all()


def test_without_a_compiler_there_is_no_library_and_a_line_says_so(monkeypatch, caplog):
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.INFO):
        assert library.__wrapped__() is None
    assert "no C compiler" in caplog.text


def test_a_compiler_that_fails_is_named(monkeypatch, caplog, tmp_path):
    broken = tmp_path / "broken-cc"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho cannot compile >&2\nexit 1\n'
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert library.__wrapped__() is None
    assert "broken-cc" in caplog.text and "cannot compile" in caplog.text
    assert not list((tmp_path / "m1").iterdir())


@needs_compiler
def test_the_library_is_compiled_once_for_all_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert library.__wrapped__() is not None
    (made,) = (tmp_path / "m1").iterdir()
    stamp = made.stat().st_mtime_ns
    assert library.__wrapped__() is not None
    assert made.stat().st_mtime_ns == stamp
