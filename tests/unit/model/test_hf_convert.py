"""Conversion between Hugging Face folders and checkpoints: same bits, little memory, resumable."""

import json
import os
import signal
import subprocess
import sys
import tomllib

import pytest
import torch
from safetensors.torch import load_file

from m1.config.schema import ModelConfig, Recipe
from m1.model import checkpoint
from m1.model.build import build_model
from m1.model.hf import load_hf
from m1.model.hf.config import parse_config
from m1.model.hf.convert import convert
from m1.model.hf.layouts import hf_views, tensor_shapes
from m1.model.hf.writing import Item, write_weights
from m1.types import M1Error

MB = 10**6


def tensors_in(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_same_tensors(first, second):
    before, after = tensors_in(first), tensors_in(second)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert before[name].dtype == tensor.dtype and torch.equal(before[name], tensor), name


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_made_from_hugging_face_holds_its_weights(hf_folder, process_group, tied):
    source = hf_folder(changes={"tie_word_embeddings": tied})
    target = source.parent / "ours"
    assert convert(source, target, max_shard_bytes=4000) == "m1"
    assert len(list((target / "checkpoint").glob("*.distcp"))) > 3
    table = tomllib.loads((target / "model.toml").read_text())["model"]
    config = ModelConfig.model_validate(table)
    model = build_model(config, vocab_size=40, seed=3)
    checkpoint.load_weights(target / "checkpoint", model)
    expected = tensors_in(source)
    views = hf_views(dict(model.named_parameters()), config)
    assert views.keys() == expected.keys()
    for name, view in views.items():
        assert torch.equal(view.reshape(expected[name].shape), expected[name].float()), name
    loaded = dict(load_hf(source).gpt.named_parameters())
    assert all(torch.equal(loaded[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_way_through_a_checkpoint_and_back_changes_no_bit(hf_folder, process_group, dtype):
    source = hf_folder(dtype=dtype)
    ours, back = source.parent / "ours", source.parent / "back"
    convert(source, ours)
    assert convert(ours, back, max_shard_bytes=4000) == "minimax"
    assert_same_tensors(source, back)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, back)]
    assert configs[0] == configs[1]
    assert (back / "tokenizer.json").exists()


def test_the_layout_may_change_on_the_way_back(hf_folder, process_group):
    source = hf_folder()
    ours, back = source.parent / "ours", source.parent / "back"
    convert(source, ours)
    assert convert(ours, back, to="published") == "published"
    assert_same_tensors(source, back)
    assert json.loads((back / "config.json").read_text())["model_type"] == "minimax_text_01"


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_trained_checkpoint_becomes_a_model_of_transformers(
    make_model, tiny_config, tmp_path, norm
):
    config = tiny_config
    if norm == "pre":
        changes = {"moe": None, "ffn_hidden_size": 24, "lightning_per_softmax": 0, "norm": "pre"}
        config = config.model_copy(update=changes)
    model = make_model(config, vocab_size=48)
    stage, target = tmp_path / "output", tmp_path / "hf"
    checkpoint.save_weights(stage / "checkpoint", model)
    recipe = Recipe.model_construct(model=config)
    assert convert(stage, target, recipe=recipe) == ("minimax" if norm == "post" else "llama")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(target, local_files_only=True)
    tokens = torch.arange(48)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            load_hf(target)(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5
        )
    stored = tensors_in(target)
    config = config.model_copy(update={"vocab_size": 48})
    for name, view in hf_views(dict(model.named_parameters()), config).items():
        assert torch.equal(view.reshape(stored[name].shape), stored[name])


def test_a_checkpoint_of_another_architecture_is_refused(make_model, tiny_config, tmp_path):
    checkpoint.save_weights(tmp_path / "checkpoint", make_model(tiny_config))
    with pytest.raises(M1Error, match="--recipe"):
        convert(tmp_path, tmp_path / "hf")
    wider = tiny_config.model_copy(update={"head_dim": 32, "rotary_dim": 32})
    with pytest.raises(M1Error) as raised:
        convert(tmp_path, tmp_path / "hf", recipe=Recipe.model_construct(model=wider))
    assert "decoder.layers.0.self_attention.qkv_proj.weight" in str(raised.value)
    assert "decoder.layers.7.self_attention.linear_proj.weight" in str(raised.value)
    assert not (tmp_path / "hf").exists()


def test_what_is_neither_is_refused(tmp_path, hf_folder, process_group):
    with pytest.raises(M1Error, match="neither"):
        convert(tmp_path, tmp_path / "target")
    source = hf_folder()
    with pytest.raises(M1Error, match="both"):
        convert(source, source)
    convert(source, tmp_path / "ours")
    with pytest.raises(M1Error, match="never overwritten"):
        convert(source, tmp_path / "ours")
    with pytest.raises(M1Error, match="already"):
        convert(tmp_path / "ours", tmp_path / "again", to="m1")


def test_the_command_line_converts_and_explains(m1, hf_folder):
    source = hf_folder()
    target = source.parent / "target"
    done = m1("convert", str(source), str(target), "--to", "published", "--shard-gb", "5e-6")
    assert done.returncode == 0 and "(published)" in done.stdout, done.stderr
    assert_same_tensors(source, target)
    failed = m1("convert", str(source), str(source.parent / "x"), "--to", "llama")
    assert failed.returncode == 1 and "no lightning layers" in failed.stderr


KILLED = """
import os, signal, sys
from pathlib import Path
from m1.model.hf.convert import convert
name, count = sys.argv[1], int(sys.argv[2])
original = getattr(os, name)
def counted(*arguments):
    global count
    count -= 1
    result = original(*arguments)
    if not count:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(os, name, counted)
to = sys.argv[5] if sys.argv[5] != "m1" else None
convert(Path(sys.argv[3]), Path(sys.argv[4]), to=to, max_shard_bytes=4000)
"""


# Every file costs two of each: its own and the journal's.
@pytest.mark.parametrize(
    ("to", "call", "count"),
    [
        ("published", "fsync", 5),
        ("published", "replace", 5),
        ("published", "replace", 6),
        ("m1", "fsync", 9),
    ],
)
def test_a_killed_conversion_goes_on_and_ends_with_the_same_bytes(
    hf_folder, process_group, to, call, count
):
    source = hf_folder()
    target, whole = source.parent / "target", source.parent / "whole"
    arguments = [call, str(count), str(source), str(target), to]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert killed.returncode == -signal.SIGKILL
    done = [*target.rglob("*.safetensors"), *target.rglob("*.distcp")]
    assert len(done) >= 2
    assert not [*target.rglob("*.index.json"), *target.rglob("complete.json")]
    inodes = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in done}
    layout = None if to == "m1" else to
    convert(source, target, to=layout, max_shard_bytes=4000)
    convert(source, whole, to=layout, max_shard_bytes=4000)
    assert contents(target) == contents(whole)
    for path in [*target.rglob("*.safetensors"), *target.rglob("*.distcp")]:
        if path.name in inodes:
            assert inodes[path.name] == (path.stat().st_ino, path.stat().st_mtime_ns)


MEASURED = """
import sys
from pathlib import Path
from m1.model.hf.convert import convert
def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
to = sys.argv[1] if sys.argv[1] != "none" else None
small, big = (list(map(Path, sys.argv[i : i + 2])) for i in (2, 4))
convert(*small, to=to, max_shard_bytes=20_000_000)  # imports, and what libraries allocate once
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = memory("VmRSS")
convert(*big, to=to, max_shard_bytes=20_000_000)
print(memory("VmHWM") - before)
"""


def grown(to, small, big):
    """Bytes by which a conversion's memory rises above that of a small one before it."""
    arguments = [to or "none", *map(str, (*small, *big))]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURED, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout.splitlines()[-1])


def write_llama(folder, *, num_layers, width):
    """A dense model in bfloat16 in files of up to 20 MB, with random bits."""
    raw = {"model_type": "llama", "hidden_size": width, "intermediate_size": 2 * width}
    raw |= {"num_hidden_layers": num_layers, "num_attention_heads": 8, "vocab_size": 2000}
    items = []
    for name, shape in tensor_shapes(parse_config(raw, folder).model).items():
        size = 2 * torch.Size(shape).numel()
        items.append(Item(name, "BF16", shape, size, lambda size=size: iter([os.urandom(size)])))
    write_weights(folder, items, max_bytes=20 * MB)
    (folder / "config.json").write_text(json.dumps(raw))
    return len(list(folder.glob("*.safetensors")))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_stays_under_two_files_in_every_direction(tmp_path):
    big, small = tmp_path / "big", tmp_path / "small"
    assert write_llama(big, num_layers=10, width=1024) == 13
    write_llama(small, num_layers=1, width=64)
    measured, sources = {}, (small, big)
    for name, to in (("again", "llama"), ("ours", None), ("back", None)):
        if name == "back":
            sources = tuple(tmp_path / f"{source.name}-ours" for source in (small, big))
        targets = [tmp_path / f"{source}-{name}" for source in ("small", "big")]
        pairs = list(zip(sources, targets, strict=True))
        measured[name] = grown(to, *pairs)
    # Measured, in MB.
    print(measured)
    assert max(measured.values()) < 2 * 20 * MB, measured
    for path in big.glob("*.safetensors"):
        for name in ("again", "back"):
            assert path.read_bytes() == (tmp_path / f"big-{name}" / path.name).read_bytes()
