import threading
from http.server import ThreadingHTTPServer

import pytest
from json_handler import JsonHandler

from m1.rewards.code.chat_model import Message, OpenAIChat
from m1.rewards.code.generation import (
    GenerationConfig,
    generate_suite,
    mutation_score,
    suite_reference,
)
from m1.rewards.code.mutants import mutants
from m1.rewards.code.suite import Suite
from m1.rewards.code.verifier import verify
from m1.sandbox import bubblewrap
from m1.types import M1Error, Task

pytestmark = pytest.mark.skipif(
    bubblewrap.failure() is not None, reason=f"no sandbox here: {bubblewrap.failure()}"
)
PROBLEM = Task("max", "s", "Given n (1..50) and n integers, print the largest.", "", "code")
REFERENCE = """n = int(input())
xs = list(map(int, input().split()))
best = xs[0]
for i in range(1, n):
    if xs[i] > best:
        best = xs[i]
print(best)
"""
GENERATOR = """import random
seed, size = input().split()
r = random.Random(seed + size)
n = r.randint(1, 4 if size == 'small' else 50)
print(n)
print(*[r.randint(-9, 9) for _ in range(n)])
"""
VALIDATOR = """n = int(input())
xs = list(map(int, input().split()))
assert 1 <= n <= 50 and len(xs) == n
"""
BRUTE = "input()\nprint(sorted(map(int, input().split()))[-1])\n"
SMALL = GenerationConfig(num_small=5, num_large=1, num_mutants=6, num_extra=2)


def reply(brute=BRUTE, **others):
    programs = {"generator": GENERATOR, "validator": VALIDATOR, "brute": brute, **others}
    blocks = [f"```python\n# {name}.py\n{text}```" for name, text in programs.items()]
    return "Here they are.\n" + "\n".join(blocks)


class Endpoint(JsonHandler):
    """An OpenAI-compatible server that says what its script says."""

    def do_POST(self):
        body = self._body()
        self.server.requests.append(body)
        status, content = self.server.script.pop(0)
        answer = {"choices": [{"message": {"role": "assistant", "content": content}}]}
        self._answer(status, answer if status == 200 else {"error": content})


@pytest.fixture
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.requests, server.script = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def chat(endpoint):
    return OpenAIChat(f"http://127.0.0.1:{endpoint.server_port}/v1/", "any")


def test_a_suite_is_made_scored_and_usable(endpoint):
    endpoint.script = [(200, reply())]
    made = generate_suite(PROBLEM, REFERENCE, chat(endpoint), config=SMALL)
    assert (made.num_rounds, made.num_mutants) == (1, len(mutants(REFERENCE, max_count=6)))
    assert made.mutation_score >= 0.5
    task = Task("max", "s", PROBLEM.prompt, suite_reference(made), "code")
    assert verify(task, BRUTE).accuracy == 1
    assert verify(task, BRUTE.replace("[-1]", "[0]")).accuracy == 0


def test_the_model_is_shown_where_its_slow_solution_differs(endpoint):
    endpoint.script = [(200, reply(BRUTE.replace("[-1]", "[0]"))), (200, reply())]
    made = generate_suite(PROBLEM, REFERENCE, chat(endpoint), config=SMALL)
    assert made.num_rounds == 2
    complaint = endpoint.requests[1]["messages"][-1]["content"]
    assert "brute.py and a right solution differ" in complaint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("I would rather not.", "no block for generator, validator, brute"),
        (reply(generator="raise SystemExit(1)\n"), "generator.py fails"),
        (reply(validator="raise SystemExit(1)\n"), "accepts only 0 different inputs"),
    ],
)
def test_after_all_rounds_what_was_wrong_is_said(endpoint, text, message):
    endpoint.script = [(200, text)] * 2
    config = GenerationConfig(num_small=4, num_large=0, num_rounds=2)
    with pytest.raises(M1Error, match=message):
        generate_suite(PROBLEM, REFERENCE, chat(endpoint), config=config)


def test_a_weak_suite_has_a_low_mutation_score():
    weak = Suite.model_validate({"tests": [{"input": "1\n3", "output": "3"}]})
    strong = Suite.model_validate(
        {"tests": [{"input": f"3\n{xs}", "output": "9"} for xs in ("9 1 2", "1 9 2", "1 2 9")]}
    )
    scores = []
    for suite in (weak, strong):
        found, count = mutation_score(suite, REFERENCE, 9)
        scores.append(len(set().union(*found)) / count)
    assert scores[0] < scores[1]


def test_mutants_are_distinct_programs_that_differ_from_the_original():
    found = mutants(
        "def f(a, b):\n    return a + b if a < b and b != 3 else max(a, b)", max_count=99
    )
    assert len(found) == len(set(found)) >= 7
    assert "a - b if" in "\n".join(found)
    assert "min(a, b)" in "\n".join(found)


def test_a_busy_endpoint_is_asked_again(endpoint):
    endpoint.script = [(503, "busy"), (429, "slow down"), (200, "hello")]
    assert chat(endpoint).complete([Message("user", "hi")]) == "hello"
    assert endpoint.requests[0]["messages"] == [{"role": "user", "content": "hi"}]


def test_a_refusal_is_an_error_with_the_remedy(endpoint):
    endpoint.script = [(401, "no key")]
    with pytest.raises(M1Error, match=r"answered 401 without a completion.*OPENAI_API_KEY"):
        chat(endpoint).complete([Message("user", "hi")])
