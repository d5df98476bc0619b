"""One request on its way through the engine: tokens as they come, or completions when they end."""

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from m1.inference.loop import EngineLoop
from m1.inference.params import SamplingParams, TokenOutput
from m1.inference.sequences import Sequence
from m1.inference.server.metrics import Metrics
from m1.inference.text import TextStream, TextTokenizer


@dataclass
class Piece:
    """What one token adds to a completion."""

    index: int
    """Which completion of the request."""
    text: str
    output: TokenOutput


@dataclass
class _Writer:
    """Text of one completion; what could begin a stop string is held back."""

    stream: TextStream
    stops: tuple[str, ...]
    stop_tokens: tuple[int, ...]
    held: str = ""

    def add(self, output: TokenOutput) -> str:
        if output.token not in self.stop_tokens:
            self.held += self.stream.step(output.token) or ""
        if output.finish_reason is not None:
            text, self.held = self.held + self.stream.rest(), ""
            ends = [text.find(stop) for stop in self.stops if stop in text]
            return text[: min(ends)] if ends and output.stop_string else text
        safe = len(self.held) - self._begun()
        text, self.held = self.held[:safe], self.held[safe:]
        return text

    def _begun(self) -> int:
        """Characters at the end that a stop string begins with."""
        longest = 0
        for stop in self.stops:
            for size in range(min(len(stop), len(self.held)), longest, -1):
                if self.held.endswith(stop[:size]):
                    longest = size
                    break
        return longest


Arrived = asyncio.Queue[tuple[int, Any]]
"""Number of the prompt; and of one of its completions a token (`TokenOutput`), or the whole
(`Sequence`)."""


class Outbox:
    """What the engine's thread has for the server's, which wakes once a step at most."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Arrived, tuple[int, Any]]] = []
        self._events: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        """Deliver to the event loop that this is called in."""
        self._events = asyncio.get_running_loop()

    def put(self, target: Arrived, number: int, item: Any) -> None:
        """Called in the engine's thread."""
        self._waiting.append((target, (number, item)))

    def flush(self) -> None:
        """Called in the engine's thread after a step."""
        if self._waiting and self._events is not None:
            sent, self._waiting = self._waiting, []
            with contextlib.suppress(RuntimeError):  # the server is closing
                self._events.call_soon_threadsafe(_deliver, sent)


def _deliver(sent: list[tuple[Arrived, tuple[int, Any]]]) -> None:
    for target, item in sent:
        target.put_nowait(item)


@dataclass
class Running:
    """A submitted request."""

    loop: EngineLoop
    tokenizer: TextTokenizer
    metrics: Metrics
    prompts: list[tuple[int, ...]]
    params: SamplingParams
    seeds: list[tuple[int, ...]]
    """Of each prompt, one for each of its completions."""
    timeout_seconds: float
    outbox: Outbox
    keys: list[int] = field(default_factory=list)
    arrived: Arrived = field(default_factory=asyncio.Queue)
    started: float = field(default_factory=time.monotonic)

    async def submit(self, *, whole: bool = False) -> None:
        """Hand the request to the engine.

        Args:
            whole: Whether completions are wanted when they have ended, by `ended`, and not token
                by token, by `pieces`; that costs the server next to nothing for a token.

        Raises:
            M1Error: A prompt is refused.
            BusyError: Too many requests wait.
        """
        self.outbox.open()
        accepted = []
        try:
            for number, (prompt, seeds) in enumerate(zip(self.prompts, self.seeds, strict=True)):

                def send(item: TokenOutput | Sequence, number: int = number) -> None:
                    self.outbox.put(self.arrived, number, item)

                listener: Any = {"on_end" if whole else "on_token": send}
                key, future = self.loop.submit(prompt, self.params, seeds, **listener)
                self.keys.append(key)
                accepted.append(asyncio.wrap_future(future))
            await asyncio.gather(*accepted)
        except BaseException:
            self.cancel()
            raise
        self.metrics.prompt_tokens.inc(sum(map(len, self.prompts)))

    def cancel(self) -> None:
        """End what has not ended."""
        for key in self.keys:
            self.loop.cancel(key)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Every token of every completion; leaving early cancels what is left.

        Raises:
            TimeoutError: It took too long.
        """
        count = len(self.seeds[0])
        num_open = sum(len(seeds) for seeds in self.seeds)
        stops = self.params.stop_strings, self.params.stop_tokens
        writers = [_Writer(self.tokenizer.decode_stream(), *stops) for _ in range(num_open)]
        is_first = True
        try:
            while num_open:
                number, output = await self._next()
                if is_first:
                    self.metrics.first_token.observe(time.monotonic() - self.started)
                    is_first = False
                index = number * count + output.index
                self.metrics.completion_tokens.inc()
                if output.finish_reason is not None:
                    num_open -= 1
                    self.metrics.finished.labels(output.finish_reason).inc()
                yield Piece(index, writers[index].add(output), output)
            self.metrics.latency.observe(time.monotonic() - self.started)
        finally:
            if num_open:
                self.cancel()

    async def ended(self) -> list[Sequence]:
        """Every completion, in order of prompts and seeds; leaving early cancels what is left.

        Raises:
            TimeoutError: It took too long.
        """
        count = len(self.seeds[0])
        found: dict[int, Sequence] = {}
        num_wanted = sum(len(seeds) for seeds in self.seeds)
        try:
            while len(found) < num_wanted:
                number, sequence = await self._next()
                found[number * count + sequence.order[1]] = sequence
                self.metrics.completion_tokens.inc(len(sequence.tokens))
                self.metrics.finished.labels(sequence.finish_reason).inc()
            self.metrics.latency.observe(time.monotonic() - self.started)
        finally:
            if len(found) < num_wanted:
                self.cancel()
        return [found[index] for index in range(num_wanted)]

    async def _next(self) -> tuple[int, Any]:
        while True:
            left = self.started + self.timeout_seconds - time.monotonic()
            if left <= 0:
                raise TimeoutError(
                    f"the request took more than {self.timeout_seconds:g} seconds and was ended; "
                    "ask for fewer tokens, or raise the server's --timeout-seconds"
                )
            try:
                return await asyncio.wait_for(self.arrived.get(), timeout=min(left, 5.0))
            except TimeoutError:
                self.loop.require_alive()


def seeds_for(seed: int | None, num_prompts: int, count: int) -> list[tuple[int, ...]]:
    """A 64-bit seed for every completion of every prompt, by the request's seed alone."""
    base = secrets.randbits(64) if seed is None else seed

    def one(prompt: int, number: int) -> int:
        digest = hashlib.sha256(f"{base}/{prompt}/{number}".encode()).digest()
        return int.from_bytes(digest[:8], "little")

    return [tuple(one(p, i) for i in range(count)) for p in range(num_prompts)]
