"""Reading and writing of safetensors files: what is found, what is missing, what is resumed."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from m1.model.hf.config import parse_config
from m1.model.hf.convert import rewrite
from m1.model.hf.folders import open_folder
from m1.model.hf.reading import chunks, open_tensors, read_into
from m1.model.hf.writing import Item, plan_shards, write_weights
from m1.types import M1Error

INDEX = "model.safetensors.index.json"


def refusal(function, *arguments, **keywords):
    with pytest.raises(M1Error) as raised:
        function(*arguments, **keywords)
    return str(raised.value)


def tensors_in(folder):
    """All tensors below a folder, read by the safetensors library."""
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def item(name, tensor):
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return Item(name, names[tensor.dtype], (*tensor.shape,), len(data), lambda: iter([data]))


def test_every_tensor_is_found_with_its_bytes(hf_folder):
    folder = hf_folder()
    expected = tensors_in(folder)
    places = open_folder(folder).places
    assert places.keys() == expected.keys()
    for name, place in places.items():
        values = torch.empty(place.shape)
        read_into(values, place)
        assert torch.equal(values, expected[name].float())


def test_all_missing_unknown_and_misshapen_tensors_are_listed(hf_folder):
    tensors = tensors_in(hf_folder("whole"))
    missing = [
        "lm_head.weight",
        "model.layers.0.self_attn.norm.weight",
        "model.layers.2.block_sparse_moe.experts.2.w2.weight",
    ]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in missing}
    unknown = ["model.layers.3.input_layernorm.weight", "model.layers.1.self_attn.q_proj.bias"]
    tensors |= {name: torch.zeros(3) for name in unknown}
    tensors["model.norm.weight"] = torch.zeros(17)
    text = refusal(open_folder, hf_folder(tensors=tensors))
    for name in missing:
        assert f"missing: {name}" in text
    for name in unknown:
        assert f"unknown: {name}" in text
    assert "model.norm.weight has shape [17] instead of [16]" in text


def test_slope_decay_and_frequency_buffers_are_skipped(hf_folder):
    tensors = tensors_in(hf_folder("whole"))
    for name in ("slope_rate", "query_decay", "key_decay", "diagonal_decay", "rotary_emb.inv_freq"):
        tensors[f"model.layers.0.self_attn.{name}"] = torch.zeros(4)
    assert len(open_folder(hf_folder(tensors=tensors)).places) == len(tensors) - 5


def test_fused_experts_are_taken_apart(hf_folder):
    expected = tensors_in(hf_folder("whole"))
    fused = {name: tensor for name, tensor in expected.items() if "block_sparse_moe" not in name}
    for layer in range(3):
        moe, mlp = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        w1, w2, w3 = (
            torch.stack([expected[f"{moe}.experts.{e}.w{n}.weight"] for e in range(3)])
            for n in (1, 2, 3)
        )
        fused[f"{mlp}.experts.gate_up_proj"] = torch.cat([w1, w3], dim=1)
        fused[f"{mlp}.experts.down_proj"] = w2
        fused[f"{mlp}.gate.weight"] = expected[f"{moe}.gate.weight"]
    places = open_folder(hf_folder(tensors=fused)).places
    for name, tensor in expected.items():
        data = tensor.flatten().view(torch.uint8).numpy().tobytes()
        assert b"".join(chunks(places[name])) == data


def test_the_head_of_a_tied_model_may_be_a_copy_of_its_embedding_only(hf_folder):
    tied = {"tie_word_embeddings": True}
    tensors = tensors_in(hf_folder("whole", changes=tied))
    copied = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    assert "lm_head.weight" not in open_folder(hf_folder("a", changes=tied, tensors=copied)).places
    copied["lm_head.weight"][0, 0] += 1
    text = refusal(open_folder, hf_folder("b", changes=tied, tensors=copied))
    assert "tie_word_embeddings" in text


def test_a_slab_of_a_parameter_is_filled_in_place(tmp_path):
    values = torch.randn(6, 4)
    save_file({"x": values}, tmp_path / "model.safetensors")
    target = torch.zeros(3, 5, 2, 4)
    read_into(target[:, 1:2].squeeze(1), open_tensors(tmp_path)["x"])
    assert torch.equal(target[:, 1], values.view(3, 2, 4))
    assert not target[:, [0, 2, 3, 4]].any()


def test_a_folder_without_weights_or_configuration_is_refused(tmp_path):
    assert "config.json does not exist" in refusal(open_folder, tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in refusal(open_folder, tmp_path)
    assert "neither" in refusal(open_tensors, tmp_path)


def test_all_files_that_the_index_names_in_vain_are_listed(hf_folder):
    folder = hf_folder()
    for number in (0, 2):
        (folder / f"part-{number}.safetensors").unlink()
    assert "part-0.safetensors, part-2.safetensors" in refusal(open_folder, folder)


def test_a_file_cut_short_is_refused(hf_folder):
    folder = hf_folder()
    path = folder / "part-1.safetensors"
    size = path.stat().st_size
    for length in (size - 1, 100, 4):
        path.write_bytes(path.read_bytes()[:length])
        assert "part-1.safetensors" in refusal(open_folder, folder)


def test_a_tensor_that_its_file_lacks_is_named(hf_folder):
    folder = hf_folder()
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["ghost"] = "part-0.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    assert "ghost in part-0.safetensors" in refusal(open_folder, folder)


def test_files_are_filled_in_order_up_to_their_size():
    items = [item(str(size), torch.zeros(size, dtype=torch.uint8)) for size in (40, 60, 1, 300, 5)]
    shards = plan_shards(items, max_bytes=100)
    assert [[i.name for i in shard.items] for shard in shards] == [
        ["40", "60"],
        ["1"],
        ["300"],
        ["5"],
    ]
    assert shards[0].name == "model-00001-of-00004.safetensors"
    (single,) = plan_shards(items, max_bytes=1000)
    assert single.name == "model.safetensors"


def test_what_is_written_is_what_safetensors_reads(tmp_path):
    tensors = {
        "odd": torch.arange(3).bfloat16(),
        "wide": torch.randn(3, 5),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "b": torch.randn(7).bfloat16(),
    }
    items = [item(name, tensor) for name, tensor in tensors.items()]
    write_weights(tmp_path, items)
    found = tensors_in(tmp_path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_saving_again_leaves_no_file_of_before(tmp_path):
    items = [item(str(i), torch.full((4,), float(i))) for i in range(5)]
    write_weights(tmp_path, items, max_bytes=16)
    assert len(list(tmp_path.glob("*.safetensors"))) == 5
    write_weights(tmp_path, items)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_conversion_into_another_layout_keeps_every_bit(hf_folder, tmp_path):
    source = hf_folder()
    rewrite(source, tmp_path / "target", "published", max_shard_bytes=3000)
    before, after = tensors_in(source), tensors_in(tmp_path / "target")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    raw = json.loads((tmp_path / "target" / "config.json").read_text())
    config = parse_config(raw, tmp_path)
    assert (config.layout, raw["eos_token_id"], raw["torch_dtype"]) == ("published", 5, "bfloat16")
    names = {path.name for path in (tmp_path / "target").iterdir()}
    assert "tokenizer.json" in names and "README.md" not in names


def test_published_code_goes_with_the_configuration_that_refers_to_it(hf_folder, tmp_path):
    rewrite(hf_folder(), tmp_path / "published", "published")
    path = tmp_path / "published" / "config.json"
    raw = {**json.loads(path.read_text()), "auto_map": {"AutoConfig": "configuration_m1.Config"}}
    path.write_text(json.dumps(raw))
    (tmp_path / "published" / "configuration_m1.py").write_text("")
    rewrite(tmp_path / "published", tmp_path / "same", "published")
    rewrite(tmp_path / "published", tmp_path / "other", "minimax")
    assert (tmp_path / "same" / "configuration_m1.py").exists()
    assert not (tmp_path / "other" / "configuration_m1.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "other" / "config.json").read_text())


def test_a_finished_conversion_run_again_writes_nothing(hf_folder, tmp_path):
    source, target = hf_folder(), tmp_path / "target"
    rewrite(source, target, "minimax", max_shard_bytes=3000)
    times = {path: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    rewrite(source, target, "minimax", max_shard_bytes=3000)
    assert times == {path: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}


def test_a_finished_file_that_changed_is_written_again(hf_folder, tmp_path):
    source, target = hf_folder(), tmp_path / "target"
    rewrite(source, target, "minimax", max_shard_bytes=3000)
    path = sorted(target.glob("*.safetensors"))[1]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    rewrite(source, target, "minimax", max_shard_bytes=3000)
    assert path.read_bytes() == content


def test_a_target_with_another_conversion_or_foreign_weights_is_left_alone(hf_folder, tmp_path):
    source, target = hf_folder(), tmp_path / "target"
    rewrite(source, target, "minimax", max_shard_bytes=3000)
    text = refusal(rewrite, source, target, "minimax", max_shard_bytes=4000)
    assert "another source, layout or shard size" in text
    (target / "conversion.json").unlink()
    text = refusal(rewrite, source, target, "minimax", max_shard_bytes=3000)
    assert "no conversion wrote" in text
