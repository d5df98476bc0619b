"""Pass rates of a small model that was trained to be right in known shares of its answers."""

import json
import shutil
import threading
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from json_handler import JsonHandler

from m1.config.schema import ModelConfig, MoeConfig, OptimizerConfig, ParallelConfig
from m1.curate.calibration import CalibrateConfig, draw_puzzles
from m1.curate.calibration_files import calibrate_files
from m1.curate.files import curate_artifact, curate_files
from m1.curate.pass_rate import PassRate
from m1.curate.rate_store import RateStore
from m1.curate.samplers import open_sampler
from m1.curate.settings import AnswererConfig, CurateConfig
from m1.data.chat import render_demonstration
from m1.data.tasks import read_tasks, write_tasks
from m1.data.tokenizer import Tokenizer, train_tokenizer
from m1.model.checkpoint import save_weights
from m1.types import M1Error, Task

QUESTIONS = {
    "always": "How many sides does a square have?",
    "half": "How many days are in one fortnight?",
    "never": "How many legs does an ordinary spider have?",
}
ANSWERS = {"always": ["4"], "half": ["14", "10"], "never": ["6"]}
REFERENCES = {"always": "4", "half": "14", "never": "8"}
TASKS = [Task(n, "s", q, REFERENCES[n], "maths", {}, "maths") for n, q in QUESTIONS.items()]
EASY, MIDDLE = 1, 2
"""Difficulties of `operation` that the model solves always, and in a quarter of its answers."""
SAMPLING = {"max_new_tokens": 16}
CONFIG = ModelConfig(
    num_layers=2,
    lightning_per_softmax=1,
    hidden_size=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    rotary_dim=16,
    moe=MoeConfig(num_experts=2, top_k=2, ffn_hidden_size=64),
    max_position=192,
)
NUM_PUZZLES = 3


def lessons():
    pairs = [
        (QUESTIONS[n], a) for n, answers in ANSWERS.items() for a in answers * (4 // len(answers))
    ]
    for difficulty, wrong in ((EASY, 0), (MIDDLE, 3)):
        for puzzle in draw_puzzles("operation", difficulty, NUM_PUZZLES, seed=1):
            pairs += [(puzzle.prompt, puzzle.reference)] * (4 - wrong) + [
                (puzzle.prompt, "99")
            ] * wrong
    return pairs


@pytest.fixture(scope="module")
def model_folder(process_group, tmp_path_factory):
    """A checkpoint with its model.toml and tokenizer, as `m1 convert` lays them out."""
    from m1.model.hf.checkpoints import model_toml
    from m1.train.microbatch import MicroBatch
    from m1.train.trainer import Trainer, cross_entropy

    folder = tmp_path_factory.mktemp("taught")
    pairs = lessons()
    train_tokenizer([p for p, _ in pairs] * 3, vocab_size=400, folder=folder / "hf")
    tokenizer = Tokenizer(folder / "hf")
    vocab_size = -(-tokenizer.vocab_size // 64) * 64
    rows = [render_demonstration(tokenizer, prompt, "", answer) for prompt, answer in pairs]
    weights = torch.cat([torch.tensor(mask[1:]) for _, mask in rows]).float()
    batch = MicroBatch(
        tokens=torch.cat([torch.tensor(tokens[:-1]) for tokens, _ in rows]),
        targets=torch.cat([torch.tensor(tokens[1:]) for tokens, _ in rows]),
        lengths=torch.tensor([len(tokens) - 1 for tokens, _ in rows]),
        weights=weights / weights.sum(),
    )
    trainer = Trainer(
        CONFIG, OptimizerConfig(lr=1e-2), vocab_size=vocab_size, seed=1, parallel=ParallelConfig()
    )
    for step in range(80):
        trainer.update([batch], cross_entropy, lr=1e-2 * min(1, (80 - step) / 40))
    save_weights(folder / "checkpoint", trainer.model)
    (folder / "model.toml").write_text(model_toml(CONFIG))
    return folder


def curation(folder, tasks, **pass_rate):
    model = {"uri": str(folder), "sampling": SAMPLING, **pass_rate.pop("model", {})}
    return CurateConfig.model_validate(
        {
            "inputs": [{"uri": str(tasks)}],
            "drop": [],
            "duplicates": None,
            "pass_rate": {"model": model, "num_samples": 40, **pass_rate},
        }
    )


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    write_tasks(path, TASKS)
    return path


@pytest.fixture(scope="module")
def curated(model_folder, task_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("curated")
    return folder, curate_files(curation(model_folder, task_file, confidence=0.9), folder)


def test_a_trained_model_keeps_the_tasks_it_sometimes_solves(curated):
    folder, card = curated
    (kept,) = read_tasks(folder / "tasks.jsonl")
    assert kept.task_id == "half"
    assert 0.2 < kept.metadata["pass_rate"] < 0.8  # taught: 0.5; 40 samples: 0.5 +- 0.24 (3 sigma)
    assert card["reasons"] == [
        {"step": "pass_rate", "reason": "never_solved", "count": 1},
        {"step": "pass_rate", "reason": "too_easy", "count": 1},
    ]


def test_the_component_names_its_model_in_the_settings(model_folder, task_file, curated, tmp_path):
    shutil.copy(curated[0] / "pass_rates.jsonl", tmp_path)  # as after a kill; saves sampling again
    config = curation(model_folder, task_file, confidence=0.9)
    output = SimpleNamespace(path=str(tmp_path), metadata={})
    curate_artifact(config.model_dump_json(), output)
    assert (output.metadata["num_kept"], output.metadata["num_dropped"]) == (1, 2)


def test_a_killed_run_samples_only_what_it_has_not(
    model_folder, task_file, curated, tmp_path, monkeypatch
):
    config = curation(model_folder, task_file, confidence=0.9)
    model, path = config.pass_rate.model, tmp_path / "pass_rates.jsonl"
    lines = (curated[0] / "pass_rates.jsonl").read_text().splitlines()
    path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])  # the kill met a write
    assert len(RateStore(path, model, 40)) == 2
    assert len(RateStore(path, model, 10)) == 0
    assert len(RateStore(path, model.model_copy(update={"seed": 2}), 40)) == 0
    sampled = []

    def counting(config):
        sampler = open_sampler(config)
        whole = sampler.sample
        sampler.sample = lambda tasks, n: (
            sampled.extend(t.task_id for t in tasks) or whole(tasks, n)
        )
        return sampler

    monkeypatch.setattr("m1.curate.samplers.open_sampler", counting)
    curate_files(config, tmp_path)
    assert sampled == ["never"]
    assert read_tasks(tmp_path / "tasks.jsonl") == read_tasks(curated[0] / "tasks.jsonl")


def test_other_weights_in_the_folder_are_another_model(model_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(model_folder, folder)
    config = AnswererConfig(uri=str(folder))
    RateStore(tmp_path / "r.jsonl", config, 4)["key"] = PassRate(1, 4)
    assert len(RateStore(tmp_path / "r.jsonl", config, 4)) == 1
    (folder / "model.toml").write_text("# changed\n" + (folder / "model.toml").read_text())
    assert len(RateStore(tmp_path / "r.jsonl", config, 4)) == 0


def test_samples_depend_on_seed_task_and_number_alone(model_folder):
    def sample(seed, tasks, count):
        config = AnswererConfig(uri=str(model_folder), sampling=SAMPLING, seed=seed)
        return open_sampler(config).sample(tasks, count)

    alone = sample(1, TASKS[1:2], 20)[0]
    assert sample(1, TASKS, 8)[1] == alone[:8]
    assert sample(2, TASKS[1:2], 20)[0] != alone
    assert set(alone) == {
        "<think></think><answer>14</answer>",
        "<think></think><answer>10</answer>",
    }


def test_a_prompt_that_is_too_long_gets_no_completion(model_folder):
    long = Task("long", "s", "word " * 500, "1", "maths")
    config = AnswererConfig(uri=str(model_folder), sampling=SAMPLING)
    found = open_sampler(config).sample([TASKS[0], long, TASKS[0]], 2)
    assert [len(row) for row in found] == [2, 0, 2]


def test_difficulties_are_calibrated_with_a_trained_model(model_folder, tmp_path):
    config = CalibrateConfig.model_validate(
        {
            "base": {"uri": str(model_folder), "sampling": SAMPLING},
            "tasks": ["operation"],
            "difficulties": [EASY, MIDDLE],
            "num_instances": NUM_PUZZLES,
            "num_samples": 30,
            "confidence": 0.9,
        }
    )
    assert calibrate_files(config, tmp_path) == {"operation": [MIDDLE]}
    easy, middle = json.loads((tmp_path / "difficulties.json").read_text())["cells"]
    assert easy["reason"] == "too_easy_for_base"
    assert easy["base"]["pass_rate"] > 0.9
    low, high = middle["base"]["interval_95"]
    assert low < 0.25 < high or abs(middle["base"]["pass_rate"] - 0.25) < 0.12
    assert sum(1 for line in (tmp_path / "base_rates.jsonl").open() if line.strip()) == 6


@pytest.fixture
def endpoint():
    """A chat endpoint that refuses long prompts and otherwise answers 14 to every second seed."""
    bodies = []

    class Handler(JsonHandler):
        def do_POST(self):
            body = self._body()
            bodies.append((self.path, body))
            prompt = body["messages"][0]["content"]
            status, reply = 200, {"message": {"content": "14" if body["seed"] % 2 else "15"}}
            data = {"choices": [reply]}
            if len(prompt) > 1000 or body["model"] != "known":
                status, data = 400, {"error": {"message": "too long, or who?"}}
            self._answer(status, data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", bodies
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_endpoint_is_sampled_with_seeds_and_settings(endpoint, task_file, tmp_path):
    url, bodies = endpoint
    model = {"uri": url, "name": "known", "sampling": {"top_p": 0.8, "max_new_tokens": 9}}
    curate_files(curation(url, task_file, model=model, num_samples=20), tmp_path / "out")
    (kept,) = read_tasks(tmp_path / "out" / "tasks.jsonl")
    assert kept.task_id == "half"
    assert len(bodies) == 60
    path, body = bodies[0]
    assert path == "/v1/chat/completions"
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (1.0, 0.8, 9)
    assert len({body["seed"] for _, body in bodies}) == 60


def test_an_endpoint_may_refuse_some_tasks_but_not_all(endpoint):
    url, _ = endpoint
    long = Task("long", "s", "word " * 500, "1", "maths")
    sampler = open_sampler(AnswererConfig(uri=url, name="known"))
    assert [len(row) for row in sampler.sample([TASKS[0], long], 3)] == [3, 0]
    unknown = open_sampler(AnswererConfig(uri=url, name="unknown"))
    with pytest.raises(M1Error, match="check the address, the model's name"):
        unknown.sample(TASKS, 2)
