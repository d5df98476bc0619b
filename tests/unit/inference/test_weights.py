import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_checks import finish, results

from m1.config.schema import SamplingConfig
from m1.inference.engine import LocalEngine, Request
from m1.inference.params import SamplingParams
from m1.inference.weights import publish, stage, unpublish
from m1.model import checkpoint
from m1.types import M1Error


@pytest.fixture
def two_models(make_model, tiny_config):
    """The engine's model, and the trainer's with other weights."""
    config = tiny_config.model_copy(update={"num_layers": 2, "lightning_per_softmax": 1})
    return make_model(config), make_model(config, seed=2)


def values(model):
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


def is_same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def generate(engine):
    requests = [Request((1, 2, 3), (7,))]
    return engine.generate(requests, SamplingConfig(max_new_tokens=20))[0][0]


@pytest.mark.parametrize("kind", ["folder", "uri", "shared memory", "checkpoint"])
def test_an_engine_goes_on_with_the_trainers_weights(two_models, tmp_path, kind):
    model, trained = two_models
    engine = LocalEngine(model, stop_token=63, num_tokens=60)
    before = generate(engine)
    uri = {
        "folder": str(tmp_path / "w"),
        "uri": f"file://{tmp_path}/w",
        "shared memory": f"shm://test-{tmp_path.name}",
        "checkpoint": str(tmp_path / "w"),
    }[kind]
    try:
        if kind == "checkpoint":
            checkpoint.save_weights(tmp_path / "w", trained)
        else:
            publish(trained, uri, version=3)
        engine.load_weights(uri, 3)
    finally:
        if kind != "checkpoint":
            unpublish(uri)
    assert is_same(values(model), values(trained))
    after = generate(engine)
    assert after.tokens == generate(LocalEngine(trained, stop_token=63, num_tokens=60)).tokens
    assert after.tokens != before.tokens
    assert set(after.policy_versions) == {3}


def test_an_engine_loads_a_hugging_face_folder(two_models, tiny_config, tmp_path):
    from m1.model.hf import save_hf

    model, trained = two_models
    config = tiny_config.model_copy(update={"num_layers": 2, "lightning_per_softmax": 1})
    save_hf(trained, tmp_path / "hf", config=config)
    engine = LocalEngine(model, stop_token=63, num_tokens=60)
    engine.load_weights(str(tmp_path / "hf"), 1)
    assert is_same(values(model), values(trained))


def damage(folder: Path, how: str) -> None:
    (path,) = folder.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "one bit":
        content[-1] ^= 1
        path.write_bytes(content)
    elif how == "missing file":
        path.unlink()
    elif how == "torn manifest":
        (folder / "weights.json").write_text('{"version": 1, "fil')
    elif how == "missing manifest":
        (folder / "weights.json").unlink()


@pytest.mark.parametrize(
    "how", ["truncated", "one bit", "missing file", "torn manifest", "missing manifest"]
)
def test_damaged_weights_are_refused_whole(two_models, tmp_path, how):
    model, trained = two_models
    publish(trained, str(tmp_path / "w"), version=1)
    damage(tmp_path / "w", how)
    engine, before = LocalEngine(model, stop_token=63, num_tokens=60), values(model)
    with pytest.raises(M1Error):
        engine.load_weights(str(tmp_path / "w"), 1)
    assert is_same(values(model), before)
    assert engine.policy_version == 0


def test_another_models_weights_are_refused_by_name(two_models, make_model, tiny_config, tmp_path):
    model, _ = two_models
    publish(make_model(tiny_config), str(tmp_path / "w"), version=1)
    with pytest.raises(M1Error, match=r"another model's: decoder\.layers\.1\."):
        stage(str(tmp_path / "w"), model)


def test_versions_never_go_back(two_models, tmp_path):
    model, trained = two_models
    publish(trained, str(tmp_path / "w"), version=5)
    engine = LocalEngine(model, stop_token=63, num_tokens=60)
    engine.load_weights(str(tmp_path / "w"), 5)
    with pytest.raises(M1Error, match="version is 4, but the engine is at 5"):
        engine.load_weights(str(tmp_path / "w"), 4)


def test_published_weights_replace_the_ones_before(two_models, tmp_path):
    model, trained = two_models
    for version, source in enumerate((model, trained)):
        publish(source, str(tmp_path / "w"), version=version)
    assert json.loads((tmp_path / "w" / "weights.json").read_text())["version"] == 1
    assert is_same(stage(str(tmp_path / "w"), model), values(trained))
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


@pytest.mark.parametrize("recompute", [False, True])
def test_running_completions_go_on_with_new_weights_and_say_which_made_each_token(
    two_models, make_core, recompute
):
    model, trained = two_models
    core = make_core(model)
    params = SamplingParams(max_new_tokens=30, temperature=0)
    (sequence,) = core.add((1, 2, 3, 4), params, (1,))
    for _ in range(10):
        core.step()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(dict(trained.named_parameters())[name])
    core.weights_changed(version=9, recompute=recompute)
    finish(core)
    assert sequence.versions == [0] * 10 + [9] * 20
    # From the same tokens, the new weights alone give what recomputation gives.
    fresh = make_core(trained)
    (alone,) = fresh.add(
        sequence.prompt + tuple(sequence.tokens[:10]),
        SamplingParams(max_new_tokens=20, temperature=0),
        (1,),
    )
    finish(fresh)
    is_as_alone = alone.logprobs == pytest.approx(sequence.logprobs[10:], abs=1e-5)
    assert is_as_alone is recompute
    if recompute:
        assert results([alone])[0][0] == tuple(sequence.tokens[10:])


WORKER = Path(__file__).with_name("broadcast_worker.py")


def broadcast(layers_of_trainer):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, str(WORKER)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    trainer = subprocess.Popen([*command, "trainer", address, layers_of_trainer], **pipes)
    engine = subprocess.Popen([*command, "engine", address, "2"], **pipes)
    try:
        return engine.communicate(timeout=120), trainer
    finally:
        for process in (trainer, engine):
            process.kill()
            process.wait()


def test_a_trainer_broadcasts_its_weights_to_an_engine_again_and_again():
    (out, error), _ = broadcast("2")
    assert out.strip() == "done", error


def test_a_trainer_with_another_model_is_refused():
    (_, error), _ = broadcast("4")
    assert "other parameters than this engine's" in error


def test_shared_memory_needs_a_plain_name(two_models):
    model, _ = two_models
    for name in ("", "a/b", "..", ".hidden"):
        with pytest.raises(M1Error, match="names no shared memory"):
            publish(model, f"shm://{name}", version=1)


def test_weights_that_are_nowhere_are_refused(two_models, tmp_path):
    shutil.rmtree(tmp_path)
    with pytest.raises(M1Error, match=r"neither weights\.json"):
        stage(str(tmp_path), two_models[0])
