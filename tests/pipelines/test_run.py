"""`m1 run` from end to end on the miniature recipe: first run, second run, changed recipe."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
STAGES = ["data", "pretrain", "sft", "rl", "evaluate", "register"]


@pytest.fixture
def root(first_run) -> Path:
    """The run root that the tests of this module add to, one after the other."""
    return first_run[0]


def statuses(summary: dict) -> dict[str, str]:
    return {stage: facts["status"] for stage, facts in summary["stages"].items()}


def test_the_first_run_does_every_stage_and_scores_every_checkpoint(first_run):
    summary = first_run[1]
    assert statuses(summary) == dict.fromkeys(STAGES, "done")
    scores = summary["scores"]["sums"]
    assert set(scores) == {"pretrain", "sft", "rl"}
    for score in scores.values():
        assert 0 <= score["low"] <= score["mean"] <= score["high"] <= 1
        assert score["n"] == 10
    assert summary["recipe"] == "mini" and len(summary["recipe_hash"]) == 64


def test_the_report_is_one_offline_page_with_every_figure(root):
    page = (root / "latest" / "report.html").read_text()

    class References(HTMLParser):
        found: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag, attrs):
            self.found += [v for k, v in attrs if k in ("src", "href") and v]

    parser = References()
    parser.feed(page)
    assert not [r for r in parser.found if r.startswith(("http", "//", "file"))]
    assert page.count("<svg") >= 4


def test_the_lineage_chain_leads_from_the_registered_model_to_the_data(root):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    version = client.get_model_version_by_alias("m1-mini", "champion")
    chain, model_id = [], version.tags["model_id"]
    while model_id:
        model = client.get_logged_model(model_id)
        chain.append(model.name)
        model_id = model.tags.get("parent_model_id")
    assert chain == ["rl-checkpoint", "sft-checkpoint", "pretrain-checkpoint"]
    pretrain = client.get_run(client.get_logged_model(model.model_id).source_run_id)
    assert [d.dataset.name for d in pretrain.inputs.dataset_inputs] == ["data"]
    parent = client.get_run(pretrain.data.tags["mlflow.parentRunId"])
    assert parent.data.tags["m1.recipe_name"] == "mini"
    artifacts = {a.path for a in client.list_artifacts(parent.info.run_id)}
    pages = {"lineage.html", "report.html", "summary.json", "recipe.json", "figures"}
    assert pages <= artifacts
    figures = {a.path for a in client.list_artifacts(parent.info.run_id, "figures")}
    names = ("scores", "rl", "probabilities", "losses")
    assert figures == {f"figures/{name}.svg" for name in names}


def test_the_exported_model_answers_in_transformers_as_ours_does(root, process_group, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from m1.config.loading import load_recipe
    from m1.config.schema import SamplingConfig
    from m1.inference.engine import LocalEngine, Request
    from m1.launch import finished_stages
    from m1.model import checkpoint
    from m1.model.build import build_model

    recipe = load_recipe([ROOT / "tests/recipes/mini.toml"], overrides=[f"storage.root={root}"])
    pointers = finished_stages(recipe)
    folder = Path(pointers["register"].metadata["hf_uri"])
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = build_model(recipe.model, vocab_size=384, seed=0)
    checkpoint.load_weights(Path(pointers["rl"].uri) / "checkpoint", ours)
    engine = LocalEngine(ours, stop_token=tokenizer.eos_token_id, num_tokens=len(tokenizer))
    prompts = ["Calculate 1 + 2.", "State the final answer: 4 - 4 =", "def f(x):"]
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        sampling = SamplingConfig(temperature=0, max_new_tokens=24)
        mine = engine.generate([Request(tuple(ids), (0,))], sampling)[0][0].tokens
        with torch.no_grad():
            out = theirs.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
        assert out[0, len(ids) :].tolist() == list(mine)


def test_a_run_continues_from_a_model_converted_from_hugging_face(
    m1, root, process_group, tmp_path
):
    from megatron.core import dist_checkpointing

    from m1.config.loading import load_recipe
    from m1.launch import finished_stages

    recipe = ROOT / "tests/recipes/mini.toml"
    first = finished_stages(load_recipe([recipe], overrides=[f"storage.root={root}"]))
    made = m1("convert", first["register"].metadata["hf_uri"], str(tmp_path / "m1"))
    assert made.returncode == 0, made.stdout + made.stderr
    changes = [f"storage.root={root}", f"pretrain.start={tmp_path / 'm1'}", "pretrain.num_steps=0"]
    ran = m1("stage", "pretrain", str(recipe), *(f"--set={change}" for change in changes))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    folder = Path(finished_stages(load_recipe([recipe], overrides=changes))["pretrain"].uri)
    source = Path(first["rl"].uri) / "checkpoint"
    wanted = dist_checkpointing.load_plain_tensors(str(source))
    found = dist_checkpointing.load_plain_tensors(str(folder / "checkpoint"))
    assert wanted.keys() == found.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []

    lost = m1("stage", "pretrain", str(recipe), f"--set={changes[0]}", "--set=pretrain.start=/none")
    assert lost.returncode != 0 and "/none neither is nor holds a checkpoint" in lost.stderr


def test_a_second_run_finds_every_stage_done(run_mini, root):
    assert statuses(run_mini(root)) == dict.fromkeys(STAGES, "cached")


def test_changing_rl_repeats_rl_and_what_follows_only(run_mini, root):
    found = statuses(run_mini(root, "rl.loss.clip_eps_high=3.0"))
    assert found == {
        "data": "cached",
        "pretrain": "cached",
        "sft": "cached",
        "rl": "done",
        "evaluate": "done",
        "register": "done",
    }


def test_a_stage_alone_needs_the_ones_before_it(m1, tmp_path):
    finished = m1("stage", "sft", "tests/recipes/mini.toml", f"--set=storage.root={tmp_path}")
    assert finished.returncode == 1
    assert "needs the results of data, pretrain" in finished.stderr
    assert "m1 stage data" in finished.stderr
