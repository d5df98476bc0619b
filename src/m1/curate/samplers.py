"""Models that answer tasks: one in this process, or one behind an OpenAI-compatible endpoint."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from m1.config.schema import SamplingConfig
from m1.curate.pass_rate import Sampler
from m1.curate.settings import AnswererConfig
from m1.inference.engine import Engine, LocalEngine, Request
from m1.inference.text import TextTokenizer
from m1.rewards.code.chat_model import Message, OpenAIChat
from m1.types import M1Error, Task


class EngineSampler:
    """Completions from an engine; the random stream depends on seed, task and number alone.

    Prompts pass through the tokenizer's chat template. A task whose prompt leaves no room for a
    completion gets none.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        sampling: SamplingConfig,
        *,
        seed: int,
        max_position: int | None = None,
    ) -> None:
        """Wrap an engine.

        Args:
            engine: Tokens in, tokens out.
            tokenizer: Of its model.
            sampling: How completions are drawn.
            seed: Of all of them.
            max_position: Tokens that a prompt and its completion may have together.
        """
        self._engine, self._tokenizer = engine, tokenizer
        self._sampling, self._seed, self._max_position = sampling, seed, max_position

    def sample(self, tasks: Sequence[Task], num_samples: int) -> list[list[str]]:
        """`num_samples` completions of every task, none where the prompt is too long."""
        prompts = [
            tuple(self._tokenizer.render_chat([{"role": "user", "content": task.prompt}]))
            for task in tasks
        ]
        seeds = [
            tuple(completion_seed(self._seed, task, number) for number in range(num_samples))
            for task in tasks
        ]
        fits = [self._fits(prompt) for prompt in prompts]
        requests = [Request(p, s) for p, s, fit in zip(prompts, seeds, fits, strict=True) if fit]
        groups = iter(self._engine.generate(requests, self._sampling))
        return [[self._text(c.tokens) for c in next(groups)] if fit else [] for fit in fits]

    def _fits(self, prompt: Sequence[int]) -> bool:
        longest = len(prompt) + self._sampling.max_new_tokens
        return self._max_position is None or longest <= self._max_position

    def _text(self, tokens: Sequence[int]) -> str:
        """Up to the first token that ends a turn: an engine knows one of them, a model may two."""
        stops = self._tokenizer.stop_tokens
        end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
        return self._tokenizer.decode(tokens[:end])


class ChatSampler:
    """Completions from an endpoint, several requests at a time.

    Raises:
        M1Error: On sampling, when the endpoint refuses every request. What it refuses of some tasks
            (too long a prompt) leaves these without completions.
    """

    def __init__(self, chat: OpenAIChat, *, seed: int, max_requests: int) -> None:
        self._chat, self._seed, self._max_requests = chat, seed, max_requests

    def sample(self, tasks: Sequence[Task], num_samples: int) -> list[list[str]]:
        """`num_samples` completions of every task, fewer where the endpoint refuses."""
        jobs = [(task, number) for task in tasks for number in range(num_samples)]
        with ThreadPoolExecutor(self._max_requests) as threads:
            found = iter(list(threads.map(lambda job: self._one(*job), jobs)))
        answers = [list(_take(found, num_samples)) for _ in tasks]
        errors = [text for row in answers for text in row if isinstance(text, M1Error)]
        if jobs and len(errors) == len(jobs):
            raise errors[0]
        return [[text for text in row if isinstance(text, str)] for row in answers]

    def _one(self, task: Task, number: int) -> str | M1Error:
        seed = completion_seed(self._seed, task, number) % 2**31
        try:
            return self._chat.complete([Message("user", task.prompt)], seed=seed)
        except M1Error as error:
            return error


def completion_seed(seed: int, task: Task, number: int) -> int:
    """64-bit seed of one completion."""
    key = f"curate/{seed}/{task.task_id}/{number}".encode()
    return int.from_bytes(sha256(key).digest()[:8], "little")


def open_sampler(config: AnswererConfig) -> Sampler:
    """The model that settings name, loaded here or called over HTTP.

    Raises:
        M1Error: It cannot be loaded.
    """
    if config.is_endpoint:
        chat = OpenAIChat(
            config.uri,
            config.name,
            temperature=config.sampling.temperature,
            top_p=config.sampling.top_p,
            max_tokens=config.sampling.max_new_tokens,
        )
        return ChatSampler(chat, seed=config.seed, max_requests=config.max_sequences)
    return _local(config)


def _local(config: AnswererConfig) -> EngineSampler:
    from m1.model import cpu

    cpu.without_compilation()  # before megatron-core is imported
    from m1.config.loading import load_recipe
    from m1.inference.loading import limits_for, load_served

    served = load_served(
        Path(config.uri.removeprefix("file://")),
        recipe=load_recipe([Path(p) for p in config.recipe]) if config.recipe else None,
        tokenizer=Path(config.tokenizer) if config.tokenizer else None,
        precision=config.precision,
    )
    tokenizer = TextTokenizer(served.tokenizer_folder)
    longest = served.config.max_position
    limits = limits_for(
        served.model, max_sequences=config.max_sequences, max_position=longest, page_size=16
    )
    engine = LocalEngine(
        served.model,
        stop_token=tokenizer.stop_tokens[0],
        num_tokens=tokenizer.vocab_size,
        max_sequences=config.max_sequences,
        limits=limits,
    )
    return EngineSampler(engine, tokenizer, config.sampling, seed=config.seed, max_position=longest)


def _take(items: Iterator[str | M1Error], count: int) -> Iterator[str | M1Error]:
    for _ in range(count):
        yield next(items)
