"""Lightning attention inside Transformer Engine's containers, recipes and recomputation."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformer_engine.pytorch")
import transformer_engine.pytorch as te
from transformer_engine.common import recipe

from m1_kernels.lightning_attention import lightning_attention, lightning_slopes
from m1_kernels.lightning_attention.te_op import LightningAttentionCore, LightningAttentionOp

HEADS, DIM, HIDDEN, TOKENS = 4, 128, 256, 160
WIDTH = HEADS * DIM
RECIPES = {
    "bf16": None,
    "delayed": recipe.DelayedScaling(),
    "current": recipe.Float8CurrentScaling(),
}


@pytest.fixture
def slopes():
    return lightning_slopes(HEADS, layer_index=3, num_layers=8).cuda()


@pytest.fixture
def cu_seqlens():
    return torch.tensor([0, 61, TOKENS], device="cuda", dtype=torch.int32)


def draw(*shape, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").bfloat16()


def attend(qkv, slopes, cu_seqlens):
    q, k, v = F.silu(qkv.view(-1, HEADS, 3, DIM)).unbind(2)
    return lightning_attention(q, k, v, slopes, cu_seqlens)[0].flatten(1)


@pytest.mark.parametrize("name", RECIPES)
def test_a_sequential_equals_its_parts(name, slopes, cu_seqlens):
    options = {"dtype": torch.bfloat16, "device": "cuda", "bias": False}
    before = te.ops.Linear(HIDDEN, 3 * WIDTH, **options)
    after = te.ops.Linear(WIDTH, HIDDEN, **options)
    chain = te.ops.Sequential(before, LightningAttentionOp(slopes, DIM), after)
    x, up = draw(TOKENS, HIDDEN, seed=1).requires_grad_(), draw(TOKENS, HIDDEN, seed=2)
    context = {"enabled": RECIPES[name] is not None, "recipe": RECIPES[name]}
    parameters = (x, *before.parameters(), *after.parameters())

    def run(work):
        with te.autocast(**context):
            out = work()
        return out.detach(), *torch.autograd.grad(out, parameters, up)

    chained = run(lambda: chain(x, cu_seqlens))
    if name == "delayed":  # its scales follow the calls
        assert all(part.isfinite().all() for part in chained)
        return
    parts = run(lambda: after(attend(before(x), slopes, cu_seqlens)))
    for found, expected in zip(chained, parts, strict=True):
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        assert error <= 2e-3, name


def test_a_recomputed_core_gives_the_same_gradients(slopes, cu_seqlens):
    core = LightningAttentionCore(slopes, DIM)
    qkv, gate = draw(TOKENS, 3 * WIDTH, seed=1), draw(TOKENS, WIDTH, seed=2)
    given = [x.requires_grad_() for x in (qkv, gate)]
    tracker = te.distributed.CudaRNGStatesTracker()
    tracker.add("model-parallel-rng", 7)

    def run(work):
        with te.autocast(enabled=True, recipe=recipe.DelayedScaling()):
            out = work(*given, cu_seqlens)
        grads = torch.autograd.grad(out.float().square().sum(), (*given, core.weight))
        return out.detach(), *grads

    plain = run(core)

    def recomputed(*args):
        get = lambda: tracker  # noqa: E731
        return te.checkpoint(core, *args, get_rng_state_tracker=get, use_reentrant=False)

    assert all(torch.equal(a, b) for a, b in zip(plain, run(recomputed), strict=True))


def test_features_that_are_no_heads_are_refused(slopes, cu_seqlens):
    op = LightningAttentionOp(slopes, DIM)
    with pytest.raises(ValueError, match="features; 4 heads of 128 take 1536"):
        op(draw(TOKENS, 8, seed=1), cu_seqlens)
