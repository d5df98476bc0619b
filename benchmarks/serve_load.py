"""Load on an `m1 serve`: clients that ask, stream, stop early and leave, for some minutes.

    python -m benchmarks.serve_load URL --json OUT [--clients 64] [--minutes 5] [--pid PID]

Every client repeats requests of random sizes; a tenth of them streams and leaves in the middle.
Reported: errors by kind, latencies, tokens/s, the server's memory at the start and at the end, and
whether it ends with all slots and pages free.
"""

import argparse
import asyncio
import json
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.machine import write

WORDS = [
    "one",
    "two",
    "three",
    "and",
    "is",
    "what",
    "plus",
    "minus",
    "if",
    "then",
    "else",
    "return",
    "for",
    "in",
    "def",
    "class",
]


@dataclass
class Found:
    """What the clients saw."""

    seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0


async def client(
    http: httpx.AsyncClient, seed: int, until: float, max_tokens: int, found: Found
) -> None:
    chance = random.Random(seed)
    while time.monotonic() < until:
        body: dict[str, Any] = {
            "prompt": " ".join(chance.choices(WORDS, k=chance.randint(1, 60))),
            "max_tokens": chance.randint(1, max_tokens),
            "temperature": chance.choice((0, 0.7, 1.0)),
            "n": chance.choice((1, 1, 1, 2, 4)),
            "ignore_eos": True,
        }
        kind = chance.choices(("whole", "stream", "leave", "bad"), (6, 3, 1, 0.5))[0]
        started = time.perf_counter()
        try:
            await ask(http, kind, body, chance, found)
            found.seconds.append(time.perf_counter() - started)
        except httpx.HTTPError as error:
            found.outcomes[f"transport {type(error).__name__}"] += 1


async def ask(
    http: httpx.AsyncClient, kind: str, body: dict[str, Any], chance: random.Random, found: Found
) -> None:
    if kind in ("whole", "bad"):
        if kind == "bad":
            body["temperature"] = -1
        response = await http.post("/v1/completions", json=body)
        expected = 400 if kind == "bad" else 200
        found.outcomes[kind if response.status_code == expected else str(response.status_code)] += 1
        if response.status_code == 200:
            found.tokens += response.json()["usage"]["completion_tokens"]
        return
    started, leave_after = time.perf_counter(), chance.randint(1, 5)
    async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        last, count = "", 0
        async for line in response.aiter_lines():
            if not line:
                continue
            if not count:
                found.first_seconds.append(time.perf_counter() - started)
            count, last = count + 1, line
            found.tokens += 1
            if kind == "leave" and count > leave_after:
                found.outcomes["leave"] += 1
                return
    is_whole = response.status_code == 200 and last == "data: [DONE]"
    found.outcomes[kind if is_whole else f"stream {response.status_code} {last[:60]}"] += 1


async def drive(url: str, options: argparse.Namespace, found: Found) -> None:
    token = os.environ.get("M1_SERVE_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    until = time.monotonic() + options.minutes * 60
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120, limits=limits) as http:
        await asyncio.gather(
            *(client(http, i, until, options.max_tokens, found) for i in range(options.clients))
        )


def metrics(url: str) -> dict[str, float]:
    token = os.environ.get("M1_SERVE_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    lines = httpx.get(f"{url}/metrics", headers=headers).text.splitlines()
    return {
        line.split()[0]: float(line.split()[1])
        for line in lines
        if line and line[0] != "#" and "{" not in line
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {f"p{p}": float(np.percentile(seconds, p)) for p in (50, 90, 99, 100)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--pid", type=int, help="Of the server, to watch its memory.")
    options = parser.parse_args()
    server = psutil.Process(options.pid) if options.pid else None
    found, memory = Found(), []
    before = metrics(options.url)

    async def watch() -> None:
        while server is not None:
            memory.append(server.memory_info().rss / 2**20)
            await asyncio.sleep(5)

    async def both() -> None:
        watching = asyncio.create_task(watch())
        await drive(options.url, options, found)
        watching.cancel()

    asyncio.run(both())
    time.sleep(2)
    after = metrics(options.url)
    names = ("m1_free_slots", "m1_pending_completions", "m1_running_sequences")
    results = {
        "requests": dict(found.outcomes),
        "errors": sum(
            count
            for name, count in found.outcomes.items()
            if name not in ("whole", "stream", "leave", "bad")
        ),
        "request_seconds": percentiles(found.seconds),
        "first_token_seconds": percentiles(found.first_seconds),
        "tokens_per_second": found.tokens / (options.minutes * 60),
        "memory_mib": {"start": memory[0], "third": memory[len(memory) // 3], "end": memory[-1]}
        if memory
        else {},
        "before": {name: before[name] for name in names},
        "after": {name: after[name] for name in names},
    }
    print(json.dumps(results, indent=1))
    write(options.json, results)


if __name__ == "__main__":
    main()
