"""The plan's memory against peaks that benchmarks/train_step.py measured on one H200.

BF16, one micro-batch, torch.cuda.max_memory_allocated; each run in a process of its own.
"""

import pytest

from m1.config.schema import ModelConfig, MoeConfig, ParallelConfig
from m1.plan.memory import Batch, plan_memory

COMMON = {
    "num_layers": 16,
    "hidden_size": 2048,
    "num_heads": 16,
    "num_kv_heads": 2,
    "head_dim": 128,
    "rotary_dim": 64,
    "precision": "bf16",
}
M1 = ModelConfig(**COMMON, moe=MoeConfig(num_experts=8, top_k=2, ffn_hidden_size=2048))
SOFTMAX = ModelConfig(
    **COMMON,
    lightning_per_softmax=0,
    norm="pre",
    moe=MoeConfig(num_experts=8, top_k=2, ffn_hidden_size=2816),
)
VOCAB = 16_384


@pytest.mark.parametrize(
    ("model", "tokens", "peak_gib"),
    [
        (M1, 65_536, 109.72),  # sequences of 8,192
        (M1, 65_536, 110.19),  # sequences of 32,768
        (SOFTMAX, 32_768, 77.50),
    ],
)
def test_peak_and_activations_are_within_15_percent_of_the_measured(model, tokens, peak_gib):
    (stage,) = plan_memory(model, ParallelConfig(), vocab_size=VOCAB, batch=Batch(tokens, 1))
    states = (stage.weights + stage.gradients + stage.optimizer) / 2**30
    activations = stage.activations / 2**30
    assert activations == pytest.approx(peak_gib - states, rel=0.15)
    assert states + activations == pytest.approx(peak_gib, rel=0.05)
