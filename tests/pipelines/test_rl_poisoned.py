"""A whole rl stage whose worker lies: its lies are named and left out, and training goes on."""

import contextlib
import json
import math
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from json_handler import JsonHandler
from serving_policy import serve_policy

from m1.config.loading import load_recipe
from m1.launch import finished_stages, run_stage
from m1.stage import METRICS, WARNINGS, read_metrics, stage_folder

RECIPE = Path(__file__).parents[1] / "recipes/mini.toml"
PROMPTS_A_STEP = 4


def nan_logprob(completion):
    completion["logprobs"][0] = math.nan


def unknown_token(completion):
    completion["tokens"][0] = 10**6


def lost_entropy(completion):
    completion["entropies"].pop()


def nothing(completion):
    for name in ("tokens", "logprobs", "entropies", "policy_versions"):
        completion[name] = []


def improbable(completion):
    completion["logprobs"] = [-1e4 for _ in completion["logprobs"]]


def lies(number, completions):
    """What becomes of the answer to the request of that number."""
    step, place = divmod(number, PROMPTS_A_STEP)
    if step == 0:  # in each group one completion that cannot be
        (nan_logprob, unknown_token, lost_entropy, nothing)[place](completions[0])
    elif step == 1:  # none that can
        for completion in completions:
            nan_logprob(completion)
    elif step == 2 and place == 0:  # an infinite ratio between the trainer's probability and this
        improbable(completions[0])


@contextlib.contextmanager
def lying(url):
    """A server before another one that changes what it samples."""
    lock, numbers = threading.Lock(), iter(range(10**6))

    class Handler(JsonHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self._answer(200, httpx.get(url + self.path).json())

        def do_POST(self):
            form = {"Content-Type": "application/json"}
            answer = httpx.post(url + self.path, content=self._raw(), headers=form, timeout=600)
            body = json.loads(answer.content)
            if self.path == "/generate" and answer.is_success:
                with lock:
                    number = next(numbers)
                lies(number, body["completions"])
            self._answer(answer.status_code, body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_a_lying_worker_costs_no_more_than_what_it_lied_about(first_run):
    root, _ = first_run

    def recipe(*sets):
        return load_recipe([RECIPE], overrides=[f"storage.root={root}", *sets])

    with (
        serve_policy(root / "lied_about", recipe(), finished_stages(recipe())) as served,
        lying(served) as url,
    ):
        stage = recipe(f'rl.rollout.urls=["{url}"]', "rl.num_steps=4")
        pointer = run_stage("rl", stage)
    folder = stage_folder("rl", stage)
    metrics = [line["metrics"] for line in read_metrics(folder / METRICS)]
    # What came in the third step is finite, what follows from it is not: an alarm leaves it out.
    assert [m.get("rl/updates", 0) for m in metrics] == [2, 0, 0, 2]
    assert [m["rl/failed_rollouts"] for m in metrics] == [4, 16, 0, 0]
    assert metrics[2]["rl/mismatch_ratio_max"] == math.inf
    assert metrics[3]["rl/mismatch_ratio_max"] < 1 + 1e-3
    assert pointer.step == 4
    told = (folder / WARNINGS).read_text()
    assert "impossible_logprobs 1, lengths_differ 1, no_tokens 1, unknown_tokens 1" in told
    assert "no update in this step: no group could be scored: 16 of 16" in told
    assert "rl/mismatch_kl_nats is inf" in told
    assert "no update in this step: an alarm left the updates out" in told
