"""Sampling for pass rates from an engine in this process or behind its Protocol."""

from collections.abc import Sequence
from hashlib import sha256

from m1.config.schema import SamplingConfig
from m1.data.chat import render_prompt
from m1.data.tokenizer import Tokenizer
from m1.inference.engine import Engine, Request
from m1.types import Task


class EngineSampler:
    """Completions as text; the random stream depends on the seed, the task and the number alone."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, sampling: SamplingConfig, *, seed: int
    ) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._sampling, self._seed = sampling, seed

    def sample(self, tasks: Sequence[Task], num_samples: int) -> list[list[str]]:
        """`num_samples` completions of every task."""
        requests = [
            Request(
                tuple(render_prompt(self._tokenizer, task.prompt)),
                tuple(self._completion_seed(task, number) for number in range(num_samples)),
            )
            for task in tasks
        ]
        groups = self._engine.generate(requests, self._sampling)
        return [[self._text(c.tokens) for c in group] for group in groups]

    def _completion_seed(self, task: Task, number: int) -> int:
        key = f"curate/{self._seed}/{task.task_id}/{number}".encode()
        return int.from_bytes(sha256(key).digest()[:8], "little")

    def _text(self, tokens: Sequence[int]) -> str:
        kept = list(tokens[:-1] if tokens and tokens[-1] == self._tokenizer.end else tokens)
        return self._tokenizer.decode(kept)
