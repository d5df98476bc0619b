"""`m1 serve` and `m1 chat` as processes: signals, crashes, evaluation harnesses."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import time

import httpx
import pytest
from serving import free_port, serve_process

LONG = {"prompt": "one and", "max_tokens": 300, "ignore_eos": True, "n": 16}


@pytest.fixture(scope="module")
def served(hf_folder):
    with serve_process(hf_folder, M1_SERVE_TOKEN="secret") as (process, url):
        yield process, url


def ask(url, body):
    headers = {"Authorization": "Bearer secret"}
    return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)


def wait_until_pending(url, count):
    """Until so many completions are under way."""
    deadline = time.monotonic() + 30
    while f"\nm1_pending_completions {count:.1f}\n" not in httpx.get(f"{url}/metrics").text:
        assert time.monotonic() < deadline, f"there were never {count} completions under way"


@pytest.mark.parametrize("is_streaming", [False, True])
def test_inspect_evaluates_the_served_model(served, monkeypatch, tmp_path, is_streaming):
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.scorer import match
    from inspect_ai.solver import generate

    monkeypatch.setenv("LOCAL_API_KEY", "secret")
    monkeypatch.setenv("LOCAL_BASE_URL", f"{served[1]}/v1")
    config = GenerateConfig(max_tokens=12, seed=1, temperature=1.0)
    model = get_model("openai-api/local/tiny", config=config, stream=is_streaming, memoize=False)
    samples = [Sample(input="one and one is", target="two"), Sample(input="what", target="x")]
    (log,) = eval(
        Task(dataset=samples, solver=generate(), scorer=match()),
        model=model,
        log_dir=str(tmp_path),
        display="none",
    )
    assert log.status == "success", log.error
    assert len(log.samples) == 2
    for sample in log.samples:
        assert sample.output.usage.output_tokens in range(1, 13)
        assert sample.output.model == "tiny"


@pytest.mark.parametrize("where", ["served", "loaded"])
def test_chat_answers_in_the_terminal(served, hf_folder, where):
    source = served[1] if where == "served" else str(hf_folder)
    program = "from m1.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "chat", source, "--max-tokens", "5"],
        input="one and one\n/new\nwhat\n/quit\n",
        env={**os.environ, "M1_SERVE_TOKEN": "secret"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # What a random model says may hold line breaks.
    assert done.stdout.startswith("you ")
    assert done.stdout.count("you ") == 4


def test_a_killed_server_gives_clean_errors_and_a_restarted_one_serves_until_sigterm(hf_folder):
    port = free_port()
    with (
        serve_process(hf_folder, port=port) as (process, url),
        concurrent.futures.ThreadPoolExecutor(8) as threads,
    ):
        cut = [threads.submit(ask, url, LONG) for _ in range(8)]
        wait_until_pending(url, 8 * LONG["n"])
        process.kill()
        for request in cut:
            with pytest.raises(httpx.TransportError):
                request.result(timeout=30)
    with serve_process(hf_folder, port=port) as (process, url):
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            open_requests = [threads.submit(ask, url, LONG) for _ in range(4)]
            wait_until_pending(url, 4 * LONG["n"])
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises(httpx.TransportError):
                ask(url, LONG)
            for request in open_requests:
                response = request.result()
                assert response.status_code == 200
                assert response.json()["usage"]["completion_tokens"] == 300 * LONG["n"]
        assert process.wait(timeout=30) in (0, -signal.SIGTERM)
