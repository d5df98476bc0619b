"""What `load_hf` and `save_hf` accept, refuse and keep."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from m1.model.hf import load_hf, save_hf
from m1.types import M1Error


@pytest.fixture
def loaded(hf_folder, process_group):
    return load_hf(hf_folder())


def test_a_plain_process_loads_without_set_up_and_importing_costs_no_torch(hf_folder):
    program = (
        "import sys; from m1.model import hf; assert 'torch' not in sys.modules\n"
        "import torch; model = hf.load_hf(sys.argv[1])\n"
        "print(list(model(torch.zeros(2, 3, dtype=torch.int64)).shape))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(hf_folder())],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[2, 3, 40]"


def test_a_loaded_model_is_ready_to_score_and_has_no_auxiliary_loss(loaded):
    assert not loaded.training
    assert loaded.config.moe.aux_loss_coefficient == 0.001
    assert loaded.gpt.config.moe_aux_loss_coeff == 0


def test_tokens_without_rows_are_refused(loaded):
    for shape in ((3,), (0, 3)):
        with pytest.raises(M1Error, match=r"must be \[B, T\]"):
            loaded(torch.zeros(shape, dtype=torch.int64))


def test_saving_keeps_the_tokenizer_and_may_change_the_layout(loaded, hf_folder, tmp_path):
    save_hf(loaded, tmp_path / "published", layout="published", token_ids={"pad_token_id": 3})
    raw = json.loads((tmp_path / "published" / "config.json").read_text())
    assert raw["model_type"] == "minimax_text_01"
    assert (raw["eos_token_id"], raw["pad_token_id"]) == (5, 3)
    assert (tmp_path / "published" / "tokenizer.json").exists()
    saved = load_file(tmp_path / "published" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    with pytest.raises(M1Error, match="no lightning layers"):
        save_hf(loaded, tmp_path / "llama", layout="llama")
    assert not (tmp_path / "llama").exists()


def test_a_bare_model_needs_its_architecture(loaded, tmp_path):
    with pytest.raises(M1Error, match="pass config"):
        save_hf(loaded.gpt, tmp_path)
    with pytest.raises(M1Error, match="do not fit"):
        wrong = loaded.config.model_copy(update={"layer_pattern": 3 * ("softmax",)})
        save_hf(loaded.gpt, tmp_path, config=wrong)
    save_hf(loaded.gpt, tmp_path, config=loaded.config)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


def test_weights_that_float32_cannot_hold_are_refused(hf_folder):
    folder = hf_folder()
    path = folder / "part-0.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(path).items()}, path)
    with pytest.raises(M1Error, match="dtypes F64"):
        load_hf(folder)
