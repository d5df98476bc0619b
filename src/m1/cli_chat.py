"""`m1 chat`: talk to a model in the terminal, loaded here or served elsewhere."""

import json
import os
import queue
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from m1.cli_serve import (
    TOKEN_VARIABLE,
    PrecisionOption,
    Recipes,
    TokenizerFolder,
)
from m1.config.loading import load_recipe
from m1.config.schema import Recipe
from m1.types import M1Error

Message = dict[str, Any]
Speaker = Any


def chat(
    source: Annotated[
        str,
        typer.Argument(help="Hugging Face folder, checkpoint, or http://HOST:PORT of m1 serve."),
    ],
    recipes: Recipes = None,
    tokenizer: TokenizerFolder = None,
    precision: PrecisionOption = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus mass.", min=1e-6, max=1)] = 0.95,
    max_tokens: Annotated[int | None, typer.Option(help="Of an answer.", min=1)] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
) -> None:
    """Chat; answers appear as they are sampled. /new begins anew, /quit or Ctrl-D ends."""
    settings = {"temperature": temperature, "top_p": top_p}
    if source.startswith(("http://", "https://")):
        speaker: Speaker = RemoteSpeaker(source, settings, max_tokens)
    else:
        warnings.filterwarnings("ignore", module="megatron")
        speaker = LocalSpeaker(
            Path(source),
            load_recipe(recipes) if recipes else None,
            tokenizer,
            precision.value if precision else None,
            settings,
            max_tokens,
        )
    console = Console(highlight=False)
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while True:
        try:
            asked = console.input("[bold]you[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if asked == "/quit":
            break
        if asked == "/new":
            messages = list(start)
            continue
        if not asked:
            continue
        messages.append({"role": "user", "content": asked})
        answer = ""
        try:
            for text in speaker.answer(messages):
                console.print(text, end="", markup=False, soft_wrap=True)
                answer += text
        except M1Error as error:
            console.print(f"[red]{error}[/]")
            messages.pop()
            continue
        except KeyboardInterrupt:
            pass
        console.print()
        messages.append({"role": "assistant", "content": answer})
    speaker.close()


class LocalSpeaker:
    """Answers from a model in this process."""

    def __init__(
        self,
        source: Path,
        recipe: Recipe | None,
        tokenizer: Path | None,
        precision: Any,
        settings: dict[str, float],
        max_tokens: int | None,
    ) -> None:
        from m1.model import cpu

        cpu.without_compilation()  # before megatron-core is imported
        from m1.inference.core import EngineCore
        from m1.inference.loading import limits_for, load_served
        from m1.inference.loop import EngineLoop
        from m1.inference.text import TextTokenizer

        served = load_served(source, recipe=recipe, tokenizer=tokenizer, precision=precision)
        self._tokenizer = TextTokenizer(served.tokenizer_folder)
        limits = limits_for(
            served.model,
            max_sequences=2,
            max_position=served.config.max_position,
            page_size=16,
            prefix_bytes=64 << 20,
        )
        size = self._tokenizer.vocab_size
        core = EngineCore(served.model, num_tokens=size, limits=limits)
        self._loop = EngineLoop(core, served.model)
        self._loop.start()
        self._settings, self._max_tokens = settings, max_tokens
        self._max_position = served.config.max_position

    def answer(self, messages: list[Message]) -> Iterator[str]:
        """Text as it comes."""
        import secrets

        from m1.inference.params import SamplingParams, TokenOutput

        prompt = tuple(self._tokenizer.render_chat(messages))
        params = SamplingParams(
            max_new_tokens=self._max_tokens or max(1, self._max_position - len(prompt)),
            stop_tokens=self._tokenizer.stop_tokens,
            temperature=self._settings["temperature"],
            top_p=self._settings["top_p"],
        )
        arrived: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
        seed = secrets.randbits(64)
        key, accepted = self._loop.submit(prompt, params, (seed,), on_token=arrived.put)
        accepted.result()
        stream = self._tokenizer.decode_stream()
        try:
            while True:
                output = arrived.get()
                if output.token not in params.stop_tokens:
                    yield stream.step(output.token) or ""
                if output.finish_reason is not None:
                    return
        finally:
            self._loop.cancel(key)

    def close(self) -> None:
        """End the engine."""
        self._loop.stop()


class RemoteSpeaker:
    """Answers from an OpenAI-compatible server."""

    def __init__(self, url: str, settings: dict[str, float], max_tokens: int | None) -> None:
        import httpx

        token = os.environ.get(TOKEN_VARIABLE)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=600)
        self._body: dict[str, Any] = {**settings, "stream": True}
        if max_tokens:
            self._body["max_tokens"] = max_tokens

    def answer(self, messages: list[Message]) -> Iterator[str]:
        """Text as it comes.

        Raises:
            M1Error: The server refuses or is not there.
        """
        import httpx

        body = {**self._body, "messages": messages}
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if not response.is_success:
                    response.read()
                    raise M1Error(f"the server refuses: {response.text}")
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        yield _delta(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            raise M1Error(f"the server does not answer ({error}); start it first") from error

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def _delta(event: dict[str, Any]) -> str:
    if "error" in event:
        raise M1Error(str(event["error"]["message"]))
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])
