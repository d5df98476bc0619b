"""The Transformer Engine model against the CPU reference model with the same weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_workers import MODEL
from reference_worker import LENGTHS, VOCAB, tokens

from m1.config.schema import MoeConfig

EXPERTS = MoeConfig(num_experts=8, top_k=2, ffn_hidden_size=256)
CONFIG = MODEL.model_copy(
    update={"moe": EXPERTS, "max_position": 512, "init_std": 0.05, "precision": "fp32"}
)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    worker = Path(__file__).with_name("reference_worker.py")
    command = [sys.executable, str(worker), CONFIG.model_dump_json(), str(folder)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gpu_model_equals_the_cpu_reference(on_cpu, precision):
    from m1.model import checkpoint
    from m1.model.build import build_model
    from m1.model.packing import pack
    from m1.model.parallel import initialize

    initialize()
    config = CONFIG.model_copy(update={"precision": precision})
    model = build_model(config, vocab_size=VOCAB, seed=7).eval()
    checkpoint.load_weights(on_cpu / "weights", model)
    packing = pack(LENGTHS, device=torch.device("cuda"))
    with torch.no_grad():
        found = model(
            tokens().cuda(), packing.positions[None], None, packed_seq_params=packing
        ).cpu()
    expected = torch.load(on_cpu / "logits.pt")
    error = relative(found, expected["fp32"])
    rounding = relative(expected["bf16"], expected["fp32"])
    each = (found - expected["fp32"]).norm(dim=-1) / expected["fp32"].norm(dim=-1)
    median = float(each.median())
    print(f"{precision}: error {error:.2e}, median over tokens {median:.2e}; ", end="")
    print(f"of the CPU model in BF16 arithmetic {rounding:.2e}")
    assert found.dtype == torch.float32
    if precision == "fp32":  # a token whose experts nearly tie may be routed otherwise
        assert median <= 5e-5 and error <= 2e-3
    else:
        assert error <= 1.5 * rounding


def test_the_head_stays_float_through_a_cast_and_is_exact():
    from megatron.core.transformer.module import Float16Module

    from m1.model.build import build_model
    from m1.model.parallel import initialize

    initialize()
    model = build_model(CONFIG.model_copy(update={"precision": "bf16"}), vocab_size=VOCAB, seed=1)
    before = model.output_layer.weight.clone()
    Float16Module(model.config, model)
    weight = model.output_layer.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, before)
    x = torch.randn(300, 1, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(300, 1, VOCAB, device="cuda")
    logits, _ = model.output_layer(x)
    (logits * upstream).sum().backward()
    wanted = x.detach().double() @ weight.double().t()
    assert relative(logits.detach(), wanted) < 1e-6
    flat = upstream.double().flatten(0, 1)
    assert relative(weight.grad, flat.t() @ x.detach().double().flatten(0, 1)) < 1e-3
    assert relative(x.grad, (upstream.double() @ weight.detach().double())) < 4e-3


def test_initial_weights_depend_on_the_seed_alone():
    from m1.model.build import build_model
    from m1.model.parallel import initialize

    initialize()
    first, other, again = (
        torch.cat([p.flatten() for p in build_model(CONFIG, vocab_size=VOCAB, seed=s).parameters()])
        for s in (7, 8, 7)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
