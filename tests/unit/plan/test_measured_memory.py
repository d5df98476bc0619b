"""The plan's memory against peaks that benchmarks/train_step.py measured on one H200.

BF16, one micro-batch, torch.cuda.max_memory_allocated; each run in a process of its own.
"""

import pytest

from benchmarks.train_step import MODELS, VOCAB
from m1.config.schema import ParallelConfig
from m1.plan.memory import Batch, plan_memory


@pytest.mark.parametrize(
    ("name", "tokens", "peak_gib"),
    [
        ("m1", 65_536, 111.91),  # sequences of 8,192
        ("m1", 65_536, 112.38),  # sequences of 32,768
        ("softmax", 65_536, 115.68),
        ("softmax", 32_768, 78.44),
    ],
)
def test_peak_and_activations_are_within_15_percent_of_the_measured(name, tokens, peak_gib):
    model = MODELS[name].model_copy(update={"precision": "bf16"})
    (stage,) = plan_memory(model, ParallelConfig(), vocab_size=VOCAB, batch=Batch(tokens, 1))
    states = (stage.weights + stage.gradients + stage.optimizer) / 2**30
    activations = stage.activations / 2**30
    assert activations == pytest.approx(peak_gib - states, rel=0.15)
    assert states + activations == pytest.approx(peak_gib, rel=0.05)
